"""Steps replayed as CUDA graphs are the steps they were captured from.

Off a GPU a stand-in records and replays ops on fixed memory (`recorder`); tests marked gpu capture.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import sparselora_fx as slx
from sparselora_fx.compiler.cuda_graphs import CudaGraphs
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.labelled_models import Plain
from tests.support.recorder import Recorder
from tests.support.replayed_steps import PLAN, batches, graphs_of
from tests.support.slow import slow


def small(dropout: float = 0.0) -> nn.Module:
    """One block with LoRA, and a head, in fp64."""
    torch.manual_seed(0)
    base = Plain()
    base.layers = base.layers[:1]
    lora = oracle.lora_config(("q", "v", "o", "up"), dropout)
    lora.task_type = None
    return oracle.randomise(get_peft_model(base, lora)).double().train()


def pair(plan: Any = PLAN, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal models, compiled alike; the first one's steps are replayed by the stand-in."""
    dropout = options.pop("dropout", 0.0)
    models = []
    for replayed in (True, False):
        model = small(dropout)
        slx.compile(
            model, oracle.estimator_of(model), plan=plan, backend="aot_eager", cuda_graphs=False,
            **options,
        )  # fmt: skip
        if replayed:
            get_runtime(model).cuda_graphs = CudaGraphs(model, Recorder())
        models.append(model)
    return models[0], models[1]


def backward(model: nn.Module, data: dict[str, Any], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    loss = model(**data).loss
    loss.backward()
    return loss.detach()  # type: ignore[no-any-return]


def assert_same_gradients(first: nn.Module, second: nn.Module) -> None:
    named = dict(second.named_parameters())
    compared = 0
    for name, parameter in first.named_parameters():
        other = named[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            assert torch.equal(parameter.grad, other), name
            compared += 1
    assert compared


@pytest.mark.parametrize("trim", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replayed_steps_are_the_same_steps(trim: bool) -> None:
    """With dropout, accumulation over two batches, an optimizer, and evaluation in between."""
    first, second = pair(dropout=0.1, trim_logits=trim)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (first, second)
    ]
    losses = []
    for i, data in enumerate(batches(12)):
        got, expected = (backward(model, data, seed=i) for model in (first, second))
        assert torch.equal(got, expected), i
        losses.append(got)
        assert_same_gradients(first, second)
        if i % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=i % 4 == 1)
        if i == 9:
            with torch.no_grad():
                results = [model.eval()(**data).loss for model in (first, second)]
            assert torch.equal(*results)
            first.train(), second.train()
    graphs = graphs_of(first)
    assert graphs.captures == 1 and graphs.pool.forwards >= 6, graphs.describe()
    assert len(set(map(float, losses))) == len(losses)
    assert "1 captured" in slx.explain(first, verbose=True)


@pytest.mark.slow
def test_dense_steps_are_replayed_too_and_choices_are_recorded() -> None:
    plan = slx.SparsityPlan(0.5, start_step=5, channel_multiple=1)
    first, second = pair(plan)
    for i, data in enumerate(batches(14)):
        records = []
        for model in (first, second):
            slx.step(model, i, 14)
            with slx.record(model) as record:
                backward(model, data, seed=i)
            records.append(record)
        assert_same_gradients(first, second)
        assert records[0].sites.keys() == records[1].sites.keys()
        for name, (_, chosen) in records[0].sites.items():
            assert torch.equal(chosen, records[1].sites[name][1])
    assert bool(records[0].sites) and graphs_of(first).captures == 2


def captured(first: nn.Module, second: nn.Module) -> dict[str, Any]:
    """Steps until the first model's are replayed; returns a batch that is."""
    for i, data in enumerate(batches(8)):
        backward(first, data, seed=i), backward(second, data, seed=i)
    assert graphs_of(first).captures == 1
    first.zero_grad(), second.zero_grad()
    return data


@pytest.mark.slow
def test_what_a_replay_cannot_answer_is_computed_again() -> None:
    """Two forwards before their backwards, gradients of the logits, a second backward."""
    first, second = pair(dropout=0.1)
    one = captured(first, second)
    other = next(batches(1))
    replays = graphs_of(first).pool.forwards
    for model in (first, second):
        torch.manual_seed(3)
        losses = [model(**data).loss for data in (one, other)]
        for loss in losses:
            loss.backward()
    assert_same_gradients(first, second)
    assert graphs_of(first).pool.forwards == replays + 1
    assert "waits for its backward" in slx.explain(first, verbose=True)
    for model in (first, second):
        torch.manual_seed(4)
        out = model(**one)
        (out.loss + out.logits.sum()).backward()
    assert_same_gradients(first, second)
    first.zero_grad(), second.zero_grad()
    torch.manual_seed(5)
    loss = first(**one).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        backward(second, one, seed=5)
    assert_same_gradients(first, second)
    assert_kept(first, one)
    assert_moved(first, second, one)


def assert_kept(model: nn.Module, data: dict[str, Any]) -> None:
    """Outputs that the caller keeps stay, and a loss that is dropped blocks nothing."""
    kept = model(**data)
    logits = kept.logits.detach().clone()
    kept.loss.backward()
    before = graphs_of(model).pool.forwards
    for _ in range(2):
        model(**data)
    backward(model, next(batches(1)), seed=0)
    assert torch.equal(kept.logits, logits)
    assert graphs_of(model).pool.forwards == before + 3


def assert_moved(first: nn.Module, second: nn.Module, data: dict[str, Any]) -> None:
    """A weight that lies elsewhere is captured anew."""
    for model in (first, second):
        weight = next(p for name, p in model.named_parameters() if "lora_A" in name)
        weight.data = weight.data.clone() * 2
    for i in range(5):
        first.zero_grad(), second.zero_grad()
        assert torch.equal(backward(first, data, seed=i), backward(second, data, seed=i))
        assert_same_gradients(first, second)
    assert graphs_of(first).captures == 2


def refusing(run: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def idle(run: Any) -> Any:
    _, result = Recorder().capture(run)
    return lambda: None, result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capture", "why"),
    [(refusing, "not permitted"), (idle, "differs")],
)
def test_what_cannot_be_captured_runs_as_usual_and_says_why(capture: Any, why: str) -> None:
    """Nor is a replay used that does not do what the call does."""
    first, second = pair(dropout=0.1)
    graphs = graphs_of(first)
    graphs.demanded = True
    graphs.pool.engine.capture = capture  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=why) as caught:
        for i, data in enumerate(batches(8)):
            got, expected = (backward(model, data, seed=i) for model in (first, second))
            assert torch.equal(got, expected)
    assert_same_gradients(first, second)
    assert sum("cuda_graphs" in str(w.message) for w in caught) == 1
    assert why in slx.explain(first, verbose=True) and graphs.captures == 0


@pytest.mark.slow
def test_lists_of_other_lengths_share_a_capture() -> None:
    """A longer list repeats a row that nobody reads: the loss is the same to rounding."""
    first, second = pair()
    for i in range(34):
        data = next(batches(1))
        data["labels"][0, : 9 + i % 3] = -100
        got, expected = (backward(model, data, seed=i) for model in (first, second))
        assert abs(float(got - expected)) <= 1e-6
    graphs = graphs_of(first)
    assert 1 <= graphs.captures <= 8 and graphs.pool.forwards >= 3, graphs.describe()


def test_words_that_are_refused() -> None:
    model = small()
    estimator = oracle.estimator_of(model)
    for options in (
        {"cuda_graphs": "always"},
        {"cuda_graphs": True, "regional": True},
        {"cuda_graphs": True, "backend": "eager"},
    ):
        with pytest.raises(slx.CompileError, match="cuda_graphs"):
            slx.compile(model, estimator, plan=PLAN, **options)
        assert "forward" not in model.__dict__


@pytest.mark.parametrize("asked", [slow("auto"), True])
def test_without_a_gpu_nothing_is_captured(asked: Any) -> None:
    model = small()
    slx.compile(
        model, oracle.estimator_of(model), plan=PLAN, backend="aot_eager", cuda_graphs=asked
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in batches(2):
            backward(model, data, seed=0)
    said = [w for w in caught if "cuda_graphs=True" in str(w.message)]
    assert len(said) == (asked is True)
    assert "CUDA graphs" not in slx.explain(model, verbose=True)
