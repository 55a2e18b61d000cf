"""Layers do not share choices, however the model is cut into graphs.

One compiled graph may serve many layers. Each layer's recorded selection must equal the one
computed for that layer alone, from its own input and factors, with the documented score.
"""

import pytest
import torch

import sparselora_fx as slx
from tests.support import oracle
from tests.support.layered_models import EVEN, LAYERS, UNEVEN, check, model_of, scored
from tests.support.slow import slow


@pytest.mark.parametrize(
    ("plan", "backend"),
    [slow(EVEN, "aot_eager"), slow(UNEVEN, "aot_eager"), (UNEVEN, "eager")],
    ids=["even", "uneven-aot", "uneven"],
)
def test_whole_model(plan: dict[str, float], backend: str) -> None:
    check(model_of(), plan, backend)


@pytest.mark.slow
def test_gradient_checkpointing() -> None:
    check(model_of(dropout=0.1, checkpointing=False), EVEN)


@pytest.mark.slow
def test_gradient_checkpointing_and_input_require_grads_with_uneven_layers() -> None:
    check(model_of(checkpointing=False, input_grads=True), UNEVEN)


@pytest.mark.slow
def test_input_require_grads() -> None:
    check(model_of(dropout=0.1, input_grads=True), EVEN)


@pytest.mark.slow
def test_reentrant_checkpointing_is_right_or_refused() -> None:
    model = model_of(dropout=0.1, checkpointing=True, input_grads=True)
    try:
        check(model, EVEN)
    except slx.CompileError as error:
        assert "reentrant" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_layers_compiled_one_by_one(plan: dict[str, float]) -> None:
    if len(plan) > 2:  # keys that name a layer; the wrappers add a step to each
        inner = [key.rpartition(".") for key in plan]
        plan = {f"{a}.layer.{b}": s for (a, _, b), s in zip(inner, plan.values(), strict=True)}
    check(model_of(cut=True), plan)


@pytest.mark.slow
def test_layers_compiled_one_by_one_under_checkpointing() -> None:
    check(model_of(cut=True, checkpointing=False), EVEN)


@pytest.mark.slow
def test_inductor_under_checkpointing() -> None:
    check(model_of(checkpointing=False), EVEN, "inductor")


@pytest.mark.slow
def test_inductor_under_checkpointing_with_dropout() -> None:
    """The compiler draws its own random numbers: only choices and finiteness are checked."""
    model, data = model_of(dropout=0.1, checkpointing=False), oracle.batch()
    got = oracle.run_compiled(model, data, scored(EVEN), "inductor")
    assert len(got.record.selections) == 2 * LAYERS
    assert all(torch.isfinite(gradient).all() for gradient in got.gradients.values())
