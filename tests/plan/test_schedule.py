"""When training is sparse: start, end, ramp, and who drives it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.plan.schedule import sparsity_scale_at
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny
from tests.support.trainers import _trainer


@pytest.mark.parametrize(
    ("step", "start", "end", "ramp", "share"),
    [
        (0, 0, None, (), 1.0),
        (4, 5, None, (), 0.0),
        (5, 5, None, (), 1.0),
        (9, 0.1, None, (), 0.0),
        (10, 0.1, None, (), 1.0),
        (50, 0, 0.5, (), 0.0),
        (49, 0, 50, (), 1.0),
        (4, 0, None, ((0.05, 0.5), (0.2, 0.9)), 0.0),
        (5, 0, None, ((0.05, 0.5), (0.2, 0.9)), 0.5),
        (20, 0, None, ((0.05, 0.5), (0.2, 0.9)), 0.9),
    ],
)
def test_share_of_a_hundred_steps(step: int, start: Any, end: Any, ramp: Any, share: float) -> None:
    assert sparsity_scale_at(step, 100, start, end, ramp) == share


@pytest.mark.parametrize(
    "options",
    [
        {"start_step": -1},
        {"start_step": 1.5},
        {"start_step": True},
        {"start_step": 9, "end_step": 3},
        {"ramp": [(0.2, 0.5), (0.1, 0.9)]},
        {"ramp": [(0.2, 1.5)]},
        {"ramp": [(5, 0.5), (0.5, 0.9)]},
        {"ramp": "fast"},
        {"sink_tokens": -1},
        {"sparse_outputs": 1.0},
        {"startstep": 3},
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(slx.PlanError):
        slx.SparsityPlan(0.5, **options)


def compiled(model: Any = None, **options: Any) -> Any:
    model = tiny(channels=112) if model is None else model
    plan = slx.SparsityPlan(0.5, channel_multiple=1, **options)
    return slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")


def kept(model: Any) -> int | None:
    """How many FFN channels a training call kept; None if it was dense."""
    with slx.record(model) as record:
        model(**oracle.batch())
    choices = [c["ffn"].numel() for c in record.selections.values() if "ffn" in c]
    return choices[0] if choices else None


@pytest.mark.slow
def test_a_driven_ramp_changes_k_and_each_level_compiles_once() -> None:
    model = compiled(ramp=[(2, 0.5), (4, 1.0)], start_step=0, tokens="all")
    seen = []
    for n in range(6):
        slx.step(model, n)
        seen.append(kept(model))
    assert seen == [None, None, 84, 84, 56, 56]
    graphs = get_runtime(model).graphs
    for n in (0, 3, 5):
        slx.step(model, n)
        kept(model)
    assert get_runtime(model).graphs == graphs == 3


def test_undriven_schedule_is_sparse_at_once_and_warns_once() -> None:
    model = compiled(start_step=0.05, tokens="all")
    with pytest.warns(UserWarning, match="nothing drives"):
        assert kept(model) == 56
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(model)


def test_start_step_zero_needs_no_driver() -> None:
    model = compiled(start_step=0, tokens="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kept(model) == 56


def test_a_fraction_needs_the_total() -> None:
    model = compiled(start_step=0.5)
    with pytest.raises(slx.PlanError, match="total"):
        slx.step(model, 3)
    slx.step(model, 3, 10)


@pytest.mark.slow
def test_trainer_resume_is_bit_equal_across_the_switch(tmp_path: Path) -> None:
    whole = compiled(oracle.llama(), start_step=2, tokens="all")
    _trainer(whole, tmp_path / "whole").train()
    resumed = compiled(oracle.llama(), start_step=2, tokens="all")
    _trainer(resumed, tmp_path / "whole").train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert get_runtime(whole).step == (5, 6)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_callback_without_a_compiled_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(slx.CompileError, match="compile"):
        _trainer(oracle.llama(layers=1), tmp_path).train()
