"""Planted faults are seen within five probes, and without one the watch stays quiet.

The same on the shipped model, with figures: `python -m benchmarks.planted_faults`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from benchmarks import planted_faults
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny

PLANTED, STEPS = 8, 13


def model_with_a_bearable_plan() -> nn.Module:
    """Half of each feed-forward's channels hardly matter."""
    model = tiny(2, channels=64)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.gate.base.weight[::2] *= 0.05
            layer.mlp.up.base.weight[::2] *= 0.05
    return model


def random_factors(model: nn.Module, estimator: slx.SVDEstimator) -> None:
    drawn = {
        name: Factors(torch.randn_like(pair.a), torch.randn_like(pair.b))
        for name, pair in estimator.factors.items()
    }
    runtime = get_runtime(model)
    other = slx.SVDEstimator(drawn, estimator.fingerprint)
    runtime.attached.place(other, other.score_of(runtime.plan.score))


def not_a_number(model: nn.Module, estimator: slx.SVDEstimator) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1.mlp.up.A" in n).fill_(float("nan"))


def nothing(model: nn.Module, estimator: slx.SVDEstimator) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("fault", [nothing, random_factors, not_a_number])
def test_a_fault_is_seen(fault: Callable[[nn.Module, slx.SVDEstimator], None]) -> None:
    model = model_with_a_bearable_plan()
    estimator = oracle.estimator_of(model, rank=8)
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    watch = slx.Watch(every=1, tolerance=0.05, mode="observe")
    slx.compile(model, estimator, plan=plan, backend="eager", watch=watch)
    seen = None
    for n in range(STEPS):
        slx.step(model, n, STEPS)
        if n == PLANTED:
            fault(model, estimator)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**oracle.batch(samples=8, seed=n)).loss.backward()
            model.zero_grad()
        if seen is None and any("drifts" in str(w.message) for w in caught):
            seen = n
    assert seen is None if fault is nothing else seen in range(PLANTED, PLANTED + 5)


def test_the_page_shows_the_committed_table() -> None:
    root = Path(planted_faults.__file__).parent
    found = json.loads((root / "results/planted_faults.json").read_text(encoding="utf-8"))
    page = (root.parent / "docs/operations.md").read_text(encoding="utf-8")
    assert planted_faults.table(found["runs"]) in page
