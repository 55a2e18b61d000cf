"""Calibrating again while training is sparse: which steps are dense, what they make, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.plan.schedule import refreshes
from tests.support import oracle
from tests.support.online_calibration import (
    KEYS,
    assert_same,
    batches,
    channels,
    collector_of,
    offline,
    plan_of,
)
from tests.support.resumed_training import trained, trainer_of
from tests.support.tiny_models import tiny


@pytest.mark.parametrize(
    ("every", "steps", "dense"),
    [(4, 10, [0, 4, 8]), (40, 90, [0, 1, 40, 41, 80, 81]), (None, 5, []), (2, 6, [0, 2, 4])],
)
def test_a_twentieth_of_the_steps_is_dense(every: int | None, steps: int, dense: list[int]) -> None:
    assert [n for n in range(steps) if refreshes(n, every)] == dense


@pytest.mark.slow
def test_the_factors_follow_what_the_latest_dense_step_read() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches(3)
    early, late = offline(model, data[:1]), offline(model, data[1:2])
    plain = oracle.plain_compiled_step(model, {**data[1], "use_cache": False}, "aot_eager")
    slx.compile(model, plan=plan_of(1, refresh=4), backend="aot_eager")
    sites, made = {}, {}
    for n, one in enumerate((0, 2, 2, 2, 1, 2)):
        slx.step(model, n)
        with slx.record(model) as record:
            done = oracle.step(model, data[one])
        sites[n] = dict(record.sites)
        made[n] = collector_of(model).estimator
        if n == 4:
            oracle.assert_identical(done, plain)
    assert [n for n, found in sites.items() if not found] == [0, 4]
    assert made[4] is None and made[1] is not None and made[5] is not None
    assert_same(made[1], early)
    assert_same(made[5], late)
    slx.restore(model)
    expected = channels(model, late, data[2])
    assert expected != channels(model, early, data[2])
    slx.compile(model, plan=plan_of(1, refresh=4), backend="aot_eager")
    for n, one in enumerate((0, 2, 2, 2, 1)):
        slx.step(model, n)
        oracle.step(model, data[one])
    slx.step(model, 5)
    with slx.record(model) as record:
        oracle.step(model, data[2])
    got = {r: {c: i.tolist() for c, i in found.items()} for r, found in record.selections.items()}
    assert got == expected


def test_a_plan_that_starts_sparse_is_refreshed_at_step_0() -> None:
    model, data = tiny().double(), batches(2)
    expected = offline(model, data[:1])
    plan = replace(plan_of(0, refresh=4), sparsity={"layers.0.mlp": 0.5})
    slx.compile(model, plan=plan, backend="eager")
    for n in range(2):
        slx.step(model, n)
        with slx.record(model) as record:
            oracle.step(model, data[n])
        assert bool(record.sites) == (n == 1)
    made = collector_of(model).estimator
    assert made is not None
    assert_same(made, expected)


def refreshed() -> nn.Module:
    """Dense for three steps, sparse in the fourth, dense again in the fifth."""
    options = {"tokens": "all", "channel_multiple": 1, "rank": 4}
    plan = slx.SparsityPlan(KEYS, start_step=3, calibrate="dense_phase", refresh=4, **options)
    return slx.compile(oracle.llama(dropout=0.1), plan=plan, backend="eager")


@pytest.mark.slow
def test_resume_is_bit_equal(tmp_path: Path) -> None:
    model = refreshed()
    trainer_of(model, tmp_path).train()
    expected = trained(model)
    for at in (4, 5):  # before the dense step, and between it and the factors that it makes
        model = refreshed()
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        got = trained(model)
        assert [n for n, value in expected.items() if not torch.equal(got[n], value)] == [], at


@pytest.mark.parametrize("value", [0, 1, -3, 2.0, True, "often"])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(slx.PlanError, match="allowed: a number of steps >= 2"):
        slx.SparsityPlan(0.5, calibrate="dense_phase", refresh=value)


def test_refreshing_needs_calibration(tmp_path: Path) -> None:
    with pytest.raises(slx.PlanError, match="needs calibrate='dense_phase'"):
        slx.SparsityPlan(0.5, refresh=100)
    plan = plan_of(refresh=7)
    plan.to_yaml(tmp_path / "plan.yaml")
    assert slx.SparsityPlan.from_yaml(tmp_path / "plan.yaml") == plan


@pytest.mark.slow
def test_compile_alone_calibrates() -> None:
    """Without an estimator and without a plan: the dense steps make one."""
    model, data = oracle.llama(layers=4), batches(2)
    assert slx.compile(model, backend="eager") is model
    for n, batch in zip((0, 50), data, strict=True):
        slx.step(model, n, 1000)  # the first twentieth is dense
        with slx.record(model) as record:
            oracle.step(model, batch)
    assert record.sites and collector_of(model).estimator.calibrated  # type: ignore[union-attr]
