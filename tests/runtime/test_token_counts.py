"""Token lists cost a step one read of the device, and none where the data loader has counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

import sparselora_fx as slx
from sparselora_fx.errors import PlanError
from sparselora_fx.ir.token_lists import count, list_lengths, place, token_lists
from sparselora_fx.notices import Notices
from sparselora_fx.runtime.counting import KEY, Comparison
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.step_tokens import step_tokens
from sparselora_fx.runtime.token_policy import split_tokens
from tests.support import oracle
from tests.support.slow import slow
from tests.support.tiny_models import tiny
from tests.support.token_batches import ragged

READ_OPS = ("_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero", "masked_select")
# No kernel on a GPU.
VIEW_OPS = ("view", "slice", "select", "expand", "unbind", "alias", "detach")
READ_FUNCTIONS = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__")


class Ops(TorchDispatchMode):
    """Notes the ops of some names."""

    def __init__(self, noted: Callable[[str], bool]) -> None:
        super().__init__()
        self.noted = noted
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.noted(name := func.overloadpacket.__name__):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes the methods that ask a tensor for a value, also those that reach no op on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READ_FUNCTIONS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def reads(model: nn.Module, data: dict[str, Any]) -> int:
    """How often a call asks a tensor for a value."""
    with Ops(READ_OPS.__contains__) as ops, Functions() as functions:
        model(**data)
    return max(len(ops.seen), len(functions.seen))


def compiled(plan: Any = None, **options: Any) -> nn.Module:
    """A compiled model whose calls run what surrounds compiled code, and no compiled code."""
    model = oracle.llama(layers=1)
    plan = plan or slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)
    model.forward.compiled = lambda *args, **kwargs: kwargs  # type: ignore[union-attr]
    return model


def lists_of(model: nn.Module, data: dict[str, Any]) -> list[Tensor]:
    model(**data)
    phase = get_runtime(model).trace_inputs
    return [*phase.tokens, *phase.labels]


def assert_same_lists(model: nn.Module, data: dict[str, Any], other: dict[str, Any]) -> None:
    """Two batches get the same lists, as many and with the same tokens."""
    for got, expected in zip(lists_of(model, data), lists_of(model, other), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("options", [{}, {"sink_tokens": 2}, {"sparse_outputs": 0.5}], ids=str)
def test_a_sparse_step_reads_once_and_counted_batches_not_at_all(options: Any, trim: bool) -> None:
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, **options)
    model = compiled(plan, trim_logits=trim)
    data = ragged()
    assert reads(model, dict(data)) == 1
    counted = slx.count_tokens(model, dict(data))
    assert set(counted) == {*data, KEY}
    assert reads(model, counted) == 0
    assert_same_lists(model, counted, data)


def test_every_token_sparse_asks_nothing() -> None:
    model = compiled(slx.SparsityPlan(0.5, tokens="all", start_step=0))
    assert reads(model, ragged()) == 0


def test_no_step_of_the_dense_phase_reads_twice() -> None:
    model = oracle.llama(layers=1)
    slx.compile(model, plan=slx.SparsityPlan(0.5, start_step=5), backend="eager")
    model.forward.compiled = lambda *args, **kwargs: kwargs  # type: ignore[union-attr]
    slx.step(model, 0, 10)
    data = ragged()
    assert reads(model, dict(data)) == 1
    assert reads(model, slx.count_tokens(model, dict(data))) == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spare", [0, 40])
def test_lists_hold_each_token_once(padded: bool, spare: int) -> None:
    """Whatever the room: tokens in order, -1 behind them, and the inverse beside them."""
    generator = torch.Generator().manual_seed(3)
    for rows, columns in [(1, 1), (1, 16), (3, 17), (4, 32), (2, 200), (0, 8)]:
        data = oracle.batch(rows, columns, padding=0)
        data["labels"][torch.rand(rows, columns, generator=generator) < 0.6] = -100
        if padded:
            data["attention_mask"][:, columns // 2 :] = 0
        plan = slx.SparsityPlan(0.5, sink_tokens=1)
        tokens = split_tokens(plan, data, shift=True)
        assert tokens is not None
        tokens = replace(tokens, padded=padded)
        labelled = tokens.labelled
        placed, totals = place(tokens)
        counts = count(totals)
        asked = {"split": True, "padded": padded, "labelled": True}
        lengths = [n + spare for n in list_lengths(counts, (rows, columns), **asked)]
        lists = token_lists(tokens, placed, lengths, labelled=True, unlike=counts.unlike)
        real = tokens.sparse | tokens.dense
        masks = [tokens.sparse, tokens.dense, *([real, ~tokens.sparse] if padded else [])]
        assert lists.labelled is not None
        flat = [*lists.tokens.encode()[1:], *lists.labelled]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        assert lists.tokens.counted is tokens.sparse and len(pairs) == len(masks) + 1
        for mask, (idx, pos) in zip([*masks, labelled], pairs, strict=True):
            expected = mask.flatten().nonzero().flatten()
            assert torch.equal(idx[: len(expected)], expected)
            assert bool((idx[len(expected) :] == -1).all())
            assert torch.equal(pos.flatten()[expected], torch.arange(len(expected)))
            assert bool((pos[~mask] == -1).all())
        sizes = {len(idx) for idx, _ in pairs}
        assert len(sizes) == len({id(idx) for idx, _ in pairs}) and not sizes & {
            0,
            1,
            rows,
            columns,
            rows * columns,
        }


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("labels"),
        lambda data: data.pop("attention_mask"),
        lambda data: data.update({k: v[:2] for k, v in data.items() if k != KEY}),
    ],
    ids=["labels-gone", "mask-gone", "fewer-samples"],
)
def test_counts_of_another_batch_are_not_used(change: Any) -> None:
    model = compiled()
    data = slx.count_tokens(model, ragged())
    change(data)
    assert_same_lists(model, dict(data), {**data, KEY: None})


@pytest.mark.parametrize(
    "change",
    [
        lambda data: {"labels": torch.where(data["labels"] == -100, 5, data["labels"])},
        lambda data: {"labels": data["labels"].flip(0)},  # as many as before, elsewhere
        lambda data: {"attention_mask": data["attention_mask"].flip(0)},
        lambda data: {"position_ids": data["position_ids"].flip(0)},
    ],
    ids=["more", "labels-moved", "mask-moved", "positions-moved"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_that_was_changed_after_it_was_counted_is_counted_anew(
    change: Any, in_place: bool
) -> None:
    """Its lists would leave tokens out."""
    model = compiled(slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, sink_tokens=1))
    data = ragged()
    positions = data["attention_mask"].cumsum(1) - 1
    data = slx.count_tokens(model, {**data, "position_ids": positions.clamp(min=0)})
    for name, value in change(data).items():
        assert not torch.equal(value, data[name])
        data[name] = data[name].copy_(value) if in_place else value
    assert_same_lists(model, dict(data), {**data, KEY: None})


def test_a_gpu_is_waited_for_once_and_answers_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are looked at when they are there; the first that says no ends the use of counts."""
    arrived: list[bool] = [True, False, False]

    class Event:
        def query(self) -> bool:
            return arrived.pop(0)

    monkeypatch.setattr("sparselora_fx.runtime.counting._on_its_way", lambda s: (s, Event()))
    notices = Notices()
    comparison = Comparison(notices)
    assert comparison._later(torch.tensor(True))  # here at once
    assert comparison._later(torch.tensor(False))  # on its way
    assert comparison._later(torch.tensor(True)) and comparison.trusted  # still
    arrived.append(True)
    with pytest.warns(UserWarning, match="a step before this one, which may have left tokens out"):
        assert not comparison._later(torch.tensor(True))
    assert not comparison.trusted


def test_counts_that_were_wrong_once_are_not_asked_again() -> None:
    model = compiled()
    get_runtime(model).comparison.trusted = False
    assert reads(model, slx.count_tokens(model, ragged())) == 1


def test_counting_again_forgets_what_was_counted() -> None:
    """Also where nothing can be counted: a batch that is on a GPU by now."""
    model = compiled()
    data = slx.count_tokens(model, ragged())
    data["position_ids"] = torch.empty(3, device="meta")
    assert KEY not in slx.count_tokens(model, data)


def test_a_part_of_a_batch_is_counted_by_its_call() -> None:
    model = compiled()
    data = slx.count_tokens(model, ragged())
    with pytest.raises(TypeError, match="not iterable"):
        iter(data[KEY])
    part = {name: value[:1] for name, value in data.items()}
    assert_same_lists(model, part, {name: value[:1] for name, value in ragged().items()})


def test_output_tokens_of_another_dtype_are_refused() -> None:
    data = {**ragged(), "output_tokens": torch.ones(3, 17, dtype=torch.int64)}
    with pytest.raises(PlanError, match=r"torch.int64 of shape .* by a bool mask"):
        slx.count_tokens(compiled(), data)


def test_labels_of_other_classes_are_no_change() -> None:
    """What matters is which of them count."""
    model = compiled()
    data = slx.count_tokens(model, ragged())
    data["labels"] = torch.where(data["labels"] == -100, -100, data["labels"] + 1)
    assert reads(model, data) == 0


@pytest.mark.parametrize("trim", [False, True])
def test_a_counted_batch_brings_its_lists(trim: bool) -> None:
    """All that is left of them to the step is to compare, and to take as much of each as it
    needs."""
    model = compiled(trim_logits=trim)
    launches = []
    for data in (ragged(), slx.count_tokens(model, ragged())):
        with Ops(lambda name: name not in VIEW_OPS) as kernels:
            model(**data)
        launches.append(kernels.seen)
    compared = {"ne", "stack"}  # on the CPU; "eq", "all" on a GPU
    assert set(launches[1]) == compared | {"narrow_copy", "select_copy"}
    assert len(launches[1]) <= len(launches[0]) // 2


def test_a_function_of_the_users_is_asked_once() -> None:
    """It may draw lots: what it said of the batch on the CPU need not hold in the step."""
    calls = []

    def policy(arguments: Any) -> Tensor:
        calls.append(1)
        return torch.rand(arguments["input_ids"].shape) < 0.5

    model = compiled(slx.SparsityPlan(0.5, start_step=0, tokens=policy))
    data = slx.count_tokens(model, ragged())
    assert KEY not in data and not calls
    model(**data)
    assert len(calls) == 1


def test_evaluation_never_sees_the_counts() -> None:
    model = compiled().eval()
    data = ragged()
    with torch.no_grad():
        got = model(**slx.count_tokens(model, dict(data))).logits
        assert torch.equal(got, model(**data).logits)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that asks for its tokens, whether they came with the batch."""
    asked: list[bool] = []

    def noting(state: Any, arguments: Any, counted: Any, shift: Any) -> Any:
        found = step_tokens(state, arguments, counted, shift)
        asked.append(found[1] is not None)
        return found

    monkeypatch.setattr("sparselora_fx.runtime.forward.step_tokens", noting)
    return asked


class Stream(IterableDataset):
    """Rows that come one by one; accelerate dispatches their batches."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


@pytest.mark.parametrize(("workers", "stream"), [slow(0, False), (1, False), (0, True)])
def test_the_trainers_data_loader_counts(
    workers: int, stream: bool, tmp_path: Any, used: list[bool]
) -> None:
    model = compiled()
    model.forward.compiled = model.forward.original  # type: ignore[union-attr]
    rows = [{k: v[i % 3] for k, v in ragged().items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, gradient_accumulation_steps=2, dataloader_num_workers=workers,
        save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, train_dataset=Stream(rows * 2) if stream else rows,
        eval_dataset=rows[:3], callbacks=[slx.SparsityCallback()],
    ).train()  # fmt: skip
    assert used == [not stream] * 6


class Masking(Trainer):
    """Takes loss from the last tokens of each batch, and returns the model's."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][:, -2:] = -100
        return super().compute_loss(model, inputs, *args, **kwargs)


class Own(Trainer):
    """Takes the model's loss itself."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss


class Interrupted(Own):
    """Breaks off its first training."""

    broken = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.broken:
            self.broken = True
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "make", "expected"),
    [
        (Own, oracle.llama, [True] * 3),
        (Masking, oracle.llama, [False] * 3),
        (Trainer, tiny, [True] * 4),  # a call begins anew when its graph shows what labels predict
        (Interrupted, oracle.llama, [True] * 3),
    ],
    ids=["own loss", "masking", "a model of one's own", "a second training"],
)
def test_trainers_that_differ_from_the_usual_one(
    kind: Any, make: Any, expected: list[bool], tmp_path: Any, used: list[bool]
) -> None:
    """Each batch that stays what it was is counted by the loader alone; none is refused."""
    model = make(layers=1) if make is oracle.llama else make(1)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    rows = [{k: v[i % 3] for k, v in ragged().items()} for i in range(8)]
    trainer = kind(
        model=model, train_dataset=rows, callbacks=[slx.SparsityCallback(summary=False)],
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    if kind is Interrupted:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.train()
    assert used == expected


@pytest.mark.gpu
@pytest.mark.parametrize("trim", [False, True])
def test_a_step_on_a_gpu_never_waits(trim: bool) -> None:
    """With counted batches, nothing between a step's begin and its backward waits for the GPU."""
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    model = oracle.llama(layers=2).cuda()
    slx.compile(model, oracle.estimator_of(model), plan=plan, trim_logits=trim)

    def moved() -> dict[str, Any]:
        data = slx.count_tokens(model, ragged())
        return {name: value.to("cuda") for name, value in data.items()}

    for _ in range(3):
        model(**moved()).loss.backward()
    data = moved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**data).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
