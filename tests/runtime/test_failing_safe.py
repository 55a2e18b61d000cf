"""Whatever breaks in a sparse step: the step is dense, once warned of, counted, and right."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.lowering import inductor_backend
from sparselora_fx.runtime import failing_safe
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny

PLAN = {"layers.0.mlp": 0.6}
REAL = inductor_backend.backend_compile


def compiled(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = tiny(dropout=0.1) if model is None else model
    plan = slx.SparsityPlan(PLAN, tokens="all", start_step=1, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), **{"plan": plan, "backend": "eager"} | options)
    slx.step(model, 1, 10)
    return model


def dense_step(**data: Any) -> oracle.Step:
    return oracle.step(tiny(dropout=0.1), oracle.batch(**data))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("the compiler gave up"), "RuntimeError: the compiler gave up"),
        (pickle.UnpicklingError("pickle data was truncated"), "pickle data was truncated"),
    ],
    ids=["no graph", "unreadable cache"],
)
def test_a_graph_that_cannot_be_had(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense from then on for this kind of call, with the numbers of a dense step; strict raises."""

    def broken(name: str, gm: Any, inputs: Any, *, rewritten: bool) -> Any:
        if rewritten:
            raise error
        return REAL(name, gm, inputs, rewritten=rewritten)

    monkeypatch.setattr(inductor_backend, "backend_compile", broken)
    model = compiled()
    with pytest.warns(UserWarning, match=f"taken DENSE: .*{words}"):
        got = oracle.step(model, oracle.batch())
    oracle.assert_close(got, dense_step(), 1e-5)
    graphs = get_runtime(model).graphs
    oracle.assert_close(oracle.step(model, oracle.batch()), dense_step(), 1e-5)
    assert get_runtime(model).graphs == graphs, "it was tried again"
    assert "fail-safe: 1 sparse steps broke" in slx.explain(model)
    with pytest.raises(Exception, match=words):
        compiled(strict=True)(**oracle.batch())


def test_a_backward_that_cannot_be_compiled_breaks_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AOTAutograd compiles it together with the forward, where the step can still be dense."""
    from torch._dynamo.backends.common import aot_autograd

    def no_backward(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no backward")

    def compiler(name: str, gm: Any, inputs: Any, *, rewritten: bool) -> Any:
        if not rewritten:
            return REAL(name, gm, inputs, rewritten=rewritten)
        with inductor_backend.backward_at_once():
            backend: Any = aot_autograd(fw_compiler=lambda g, i: g, bw_compiler=no_backward)
            return backend(gm, inputs)

    monkeypatch.setattr(inductor_backend, "backend_compile", compiler)
    model = compiled()
    with pytest.warns(UserWarning, match="taken DENSE: .*no backward"):
        got = oracle.step(model, oracle.batch())
    oracle.assert_close(got, dense_step(), 1e-5)


def test_no_memory_at_a_new_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """That shape is dense, the others stay sparse; random numbers and buffers as if untried."""
    model = compiled()
    model.register_buffer("calls", torch.zeros(()))
    sparse = oracle.step(model, oracle.batch())
    runtime, healthy = get_runtime(model), model.forward.compiled
    runtime.safety.buffers.written = [model.calls]

    def short(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 13:
            model.calls.add_(1)
            if runtime.sparse_now:
                torch.rand(3)  # a part of the step has run
                raise torch.OutOfMemoryError("CUDA out of memory")
        return healthy(*args, **kwargs)

    monkeypatch.setattr(model.forward, "compiled", short)
    with pytest.warns(UserWarning, match="out of memory"):
        long = oracle.step(model, oracle.batch(length=17))
    oracle.assert_close(long, dense_step(length=17), 1e-5)
    assert float(model.calls) == 1, "the attempt that broke has left a trace"
    oracle.assert_identical(oracle.step(model, oracle.batch()), sparse)
    tally = runtime.tally
    assert tally.all_sparse == 2, "the step that broke counts as sparse"


def test_not_even_a_dense_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles: the model's own forward takes the step, from the same random numbers."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise OSError("cache entry is damaged")

    model = compiled()
    model(**oracle.batch())
    monkeypatch.setattr(model.forward, "compiled", never)
    with pytest.warns(UserWarning, match="cache entry is damaged"):
        got = oracle.step(model, oracle.batch())
    oracle.assert_close(got, dense_step(), 1e-6)


def test_a_storm_ends_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing_safe, "STORM", 2)
    model = compiled()
    model(**oracle.batch())
    get_runtime(model).recompiles.again["a kind"] = 2
    with pytest.warns(UserWarning, match="nothing more is compiled"):
        model(**oracle.batch())
    graphs = get_runtime(model).graphs
    oracle.assert_close(oracle.step(model, oracle.batch(length=9)), dense_step(length=9), 1e-6)
    assert get_runtime(model).graphs == graphs
    assert "1 steps ran in plain PyTorch" in slx.explain(model)
    strict = compiled(strict=True)
    get_runtime(strict).recompiles.again["a kind"] = 2
    with pytest.raises(slx.CompileError, match="compiled again 2 times"):
        strict(**oracle.batch())


def test_a_backward_that_breaks_leaves_no_wrong_gradient() -> None:
    """Autograd cannot take it dense: a part of the gradients is refused by the next call, and the
    step that is made again is dense."""
    model = compiled()
    model(**oracle.batch()).loss.backward()
    model.zero_grad(set_to_none=True)
    first = next(p for p in model.parameters() if p.requires_grad)  # the last of the backward

    def full(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = first.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        model(**oracle.batch()).loss.backward()
    handle.remove()
    assert any(p.grad is not None for p in model.parameters())
    with pytest.raises(slx.BackwardError, match="zero_grad"):
        model(**oracle.batch())
    oracle.assert_close(oracle.step(model, oracle.batch()), dense_step(), 1e-5)
    assert "an error in its backward (1)" in slx.explain(model)
    model(**oracle.batch(length=9)).loss.backward()
    assert get_runtime(model).sparse_now, "other shapes stay sparse"


def test_a_broken_compilation_ahead_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, gm: Any, inputs: Any, *, rewritten: bool) -> Any:
        if rewritten:
            raise RuntimeError("the compiler gave up")
        return REAL(name, gm, inputs, rewritten=rewritten)

    monkeypatch.setattr(inductor_backend, "backend_compile", broken)
    model = compiled(precompile=True)
    slx.step(model, 0, 10)
    with pytest.warns(UserWarning, match="compiling ahead: RuntimeError: the compiler gave up"):
        got = oracle.step(model, oracle.batch())
    oracle.assert_close(got, dense_step(), 1e-5)


def test_a_users_own_error_is_not_hidden() -> None:
    """Of the model, or of what decides which tokens are sparse."""
    model = compiled()
    model(**oracle.batch())
    data = oracle.batch()
    data["input_ids"] = data["input_ids"] + 10_000
    with pytest.raises(IndexError):
        model(**data)
    assert "fail-safe" not in slx.explain(model)
    model = tiny()
    plan = slx.SparsityPlan(PLAN, tokens=_policy, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    model(**oracle.batch())
    with pytest.raises(KeyError, match="no policy"):
        model(**oracle.batch(length=9))
    assert "fail-safe" not in slx.explain(model)


def _policy(arguments: dict[str, Any]) -> torch.Tensor:
    if arguments["input_ids"].shape[1] == 9:
        raise KeyError("no policy")
    return torch.ones_like(arguments["input_ids"], dtype=torch.bool)
