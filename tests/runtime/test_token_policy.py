"""Token policies: context tokens are sparse, output tokens dense, padding costs nothing and
changes nothing."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.token_policy import split_tokens
from tests.support import oracle
from tests.support.slow import slow
from tests.support.token_batches import IGNORED, by_token, predicting, ragged

CONTEXT = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def check(
    data: dict[str, Any],
    dense: Tensor,
    *,
    targets: Any = "all-linear",
    lora_branch: str = "dense",
    dropout: float = 0.0,
    bias: bool = True,
    backend: str = "eager",
    layers: int = 1,
    **plan: Any,
) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "bias": bias, "layers": layers}
    model = oracle.llama(targets=targets, dropout=dropout, **options)
    plan = {"start_step": 0, "channel_multiple": 1, **plan}
    sparsity = slx.SparsityPlan(oracle.mixed(model), **plan)
    got = oracle.run_compiled(model, data, sparsity, backend, lora_branch=lora_branch)
    assert len(got.record.sites) == 7 * layers
    by_token(model, got.record, dense, lora_branch)
    expected = oracle.step(model, data)
    assert abs(float(got.loss - expected.loss)) <= 1e-9
    for name, gradient in expected.gradients.items():
        assert oracle.difference(got.gradients[name], gradient) <= 1e-9, name


def root(x: Tensor) -> Tensor:
    return x.abs().sqrt()


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[no-any-return]


def safe_root(x: Tensor) -> Tensor:
    """`root`, with a derivative of 0 at 0."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).abs().sqrt())


def test_a_function_whose_derivative_is_infinite_at_zero() -> None:
    """Padding a token list makes no zeros that the function would meet."""
    data = ragged()
    model = oracle.llama(targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    mlp = next(m for m in model.modules() if hasattr(m, "act_fn"))
    mlp.act_fn = Function(root)
    plan = slx.SparsityPlan({"mlp": 0.5}, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan)
    assert len(got.record.sites) == 3
    mlp.act_fn = Function(safe_root)  # the masked channels of the reference are zeros
    by_token(model, got.record, predicting(data), "dense")
    expected = oracle.step(model, {**data, "use_cache": False})
    oracle.assert_close(got, expected, 1e-9)


@pytest.mark.parametrize("lora_branch", ["dense", slow("sparse")])
@pytest.mark.parametrize("targets", ["all-linear", slow(oracle.ATTENTION_TARGETS)])
def test_context_tokens_are_sparse_and_output_tokens_dense(targets: Any, lora_branch: str) -> None:
    data = ragged()
    options = {"lora_branch": lora_branch, "backend": "aot_eager"}
    check(data, predicting(data), targets=targets, **options)


def test_dropout_draws_the_same_masks() -> None:
    data = ragged()
    check(data, predicting(data), dropout=0.1)


def test_without_output_tokens_and_with_a_row_of_padding() -> None:
    data = ragged()
    data["labels"][:] = IGNORED
    data["labels"][0, 3] = 5
    data["attention_mask"][2, 1:] = 0
    check(data, predicting(data), layers=2)


def test_one_sample_of_output_tokens_only() -> None:
    data = oracle.batch(1, 9, padding=0)
    check(data, predicting(data))


@pytest.mark.slow
def test_sink_tokens_are_dense() -> None:
    data = ragged()
    dense = predicting(data)
    dense[:, :2] |= data["attention_mask"].bool()[:, :2]
    check(data, dense, sink_tokens=2)


def test_a_users_mask_decides() -> None:
    data = ragged()
    sparse = torch.rand(data["input_ids"].shape, generator=torch.Generator().manual_seed(3)) < 0.5
    dense = data["attention_mask"].bool() & ~sparse
    check(data, dense, tokens=lambda arguments: sparse)


def test_a_users_mask_of_another_shape_is_refused() -> None:
    model = oracle.llama(layers=1)
    plan = slx.SparsityPlan(0.5, start_step=0, tokens=lambda arguments: torch.ones(3).bool())
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    with pytest.raises(slx.PlanError, match="bool tensor of shape"):
        model(**oracle.batch())


def test_zero_context_tokens_runs_dense() -> None:
    model = oracle.llama(layers=1, dtype=torch.float64)
    data = oracle.batch(2, 8, padding=0)
    expected = oracle.step(model, {**data, "use_cache": False})
    plan = slx.SparsityPlan(0.5, start_step=0, tokens=lambda arguments: torch.zeros(2, 8).bool())
    got = oracle.run_compiled(model, data, plan)
    assert got.record.sites == {}
    assert abs(float(got.loss - expected.loss)) <= 1e-12


@pytest.mark.parametrize("prompt", [slow(True), False], ids=["prompt", "no-prompt"])
def test_padding_on_the_left(prompt: bool) -> None:
    """Without a prompt, the first label of the padded row is predicted by a padding token."""
    data = ragged(left=True)
    if prompt:
        data["labels"][1:, :8] = IGNORED
    dense = predicting(data)
    assert bool(dense[data["attention_mask"] == 0].any()) is not prompt
    check(data, dense, layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_padding_content_changes_nothing(left: bool) -> None:
    model = oracle.llama(layers=2, dtype=torch.float64)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    data = ragged(left=left)
    data["labels"][1:, :8] = IGNORED
    other = {**data, "input_ids": data["input_ids"].clone()}
    noise = torch.randint(1, oracle.VOCABULARY, other["input_ids"].shape)
    hidden = other["attention_mask"] == 0
    other["input_ids"][hidden] = noise[hidden]
    first, second = (oracle.run_compiled(model, d, plan) for d in (data, other))
    assert float((first.loss - second.loss).abs()) <= 1e-12
    for name, (_, chosen) in first.record.sites.items():
        assert torch.equal(chosen, second.record.sites[name][1])


@pytest.mark.slow
def test_many_lengths_compile_at_most_three_times() -> None:
    model = oracle.llama(layers=1)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(200):
        samples, length = draw(1, 4), draw(8, 40)
        data = oracle.batch(samples, length, padding=0, seed=draw(0, 999))
        for row in range(samples):
            data["labels"][row, : draw(0, length)] = IGNORED
            padding = draw(0, length // 3)
            data["attention_mask"][row, length - padding :] = 0
        data["labels"][data["attention_mask"] == 0] = IGNORED
        model(**data)
    assert get_runtime(model).graphs <= 3
    assert "14 of" not in slx.explain(model, verbose=True) and "7 of 7" in slx.explain(
        model, verbose=True
    )


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_output_tokens_is_sparse(share: float) -> None:
    data = oracle.batch(2, 41, padding=0)
    plan = slx.SparsityPlan(0.5, sparse_outputs=share)
    tokens = split_tokens(plan, data, shift=True)
    assert tokens is not None and tokens.split
    assert int(tokens.dense.sum()) == pytest.approx(2 * 40 * (1 - share), abs=2)
    assert not bool((tokens.dense & tokens.sparse).any())
    assert bool((tokens.dense | tokens.sparse).all())


STARTS = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
    "cu_seq_lens_q": torch.tensor([0, 4, 10], dtype=torch.int32),
}


@pytest.mark.parametrize("name", STARTS)
def test_packed_samples_have_sinks_of_their_own(name: str) -> None:
    data = oracle.batch(1, 10, padding=0) | {name: STARTS[name]}
    data["labels"][:] = IGNORED
    tokens = split_tokens(slx.SparsityPlan(0.5, sink_tokens=1), data, shift=True)
    assert tokens is not None
    assert tokens.dense.nonzero()[:, 1].tolist() == [0, 4]


@pytest.mark.parametrize("name", [slow(n) if n == "position_ids" else n for n in STARTS])
def test_packed_samples_are_sliced_right(name: str) -> None:
    """The separator of two samples carries no label; no attention mask, as collators pack them."""
    data = oracle.batch(1, 10, padding=0) | {name: STARTS[name]}
    data["labels"][0, [0, 1, 4, 5, 6]] = IGNORED
    dense = predicting(data)
    del data["attention_mask"]
    dense[0, [0, 4]] = True
    check(data, dense, sink_tokens=1)


def test_what_a_graph_is_given_is_not_the_batchs_own_mask() -> None:
    """The same tensor twice among a graph's inputs is another graph."""
    data = ragged()
    data["attention_mask"] = data["attention_mask"].bool()
    tokens = split_tokens(slx.SparsityPlan(0.5, tokens="all"), {**data, "labels": None}, shift=True)
    assert tokens is not None and torch.equal(tokens.sparse, data["attention_mask"])
    assert tokens.sparse is not data["attention_mask"] and not tokens.split


@pytest.mark.parametrize("counted", [False, True])
def test_shift_labels_say_where_the_loss_is(counted: bool) -> None:
    """transformers' losses take them before ``labels``, which say something else here."""
    model = oracle.llama(layers=1, dtype=torch.float64)
    reference = copy.deepcopy(model)
    data = ragged()
    shifted = torch.full_like(data["labels"], -100)
    shifted[:, -5:-1] = data["input_ids"][:, -4:]
    data["shift_labels"] = shifted
    slx.compile(model, oracle.estimator_of(model), plan=CONTEXT, backend="eager")
    own = slx.count_tokens(model, dict(data)) if counted else data
    assert not counted or len(own) == len(data) + 1
    with slx.record(model) as record:
        got = oracle.step(model, own)
    slx.restore(model)
    by_token(reference, record, shifted != -100, "dense")
    oracle.assert_close(got, oracle.step(reference, data), 1e-12)


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_arguments_by_place_are_those_of_the_wrapper(embedded: bool) -> None:
    """A PEFT model for a task has its arguments in another order than the model inside."""
    model = oracle.llama(layers=1, dtype=torch.float64)
    reference, data = copy.deepcopy(model), ragged()
    assert list(inspect.signature(type(model).forward).parameters)[3:5] == [
        "inputs_embeds", "labels",
    ]  # fmt: skip
    words = model.get_input_embeddings()(data["input_ids"]).detach() if embedded else None
    ids = None if embedded else data["input_ids"]
    call = (ids, data["attention_mask"], words, data["labels"])
    slx.compile(model, oracle.estimator_of(model), plan=CONTEXT, backend="eager")
    with slx.record(model) as record, warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = model(*call).loss
    slx.restore(model)
    by_token(reference, record, predicting(data), "dense")
    assert record.sites and float(loss) == pytest.approx(float(reference(*call).loss), rel=1e-6)
