"""What tests share: online calibration."""

from __future__ import annotations

from typing import Any

from torch import nn

import sparselora_fx as slx
from sparselora_fx.estimator.online import Collector
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle

KEYS = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}


def plan_of(start: Any = 3, **options: Any) -> slx.SparsityPlan:
    options = {"tokens": "all", "channel_multiple": 1, "rank": 4, **options}
    return slx.SparsityPlan(KEYS, start_step=start, calibrate="dense_phase", **options)


def collector_of(model: nn.Module) -> Collector:
    found = get_runtime(model).collector
    assert found is not None
    return found


def batches(count: int = 3) -> list[dict[str, Any]]:
    """Batches of different lengths, with padding and labels on the last few tokens."""
    made = [oracle.batch(2, 9 + 4 * i, padding=2 + i, seed=30 + i) for i in range(count)]
    for data in made:
        data["labels"][:, :-5] = -100
    return made


def offline(model: nn.Module, data: list[dict[str, Any]]) -> slx.SVDEstimator:
    inputs = [{k: v for k, v in one.items() if k != "labels"} for one in data]
    return slx.SVDEstimator.build(model, rank=4, calibration=inputs, progress=False)


def assert_same(got: slx.SVDEstimator, expected: slx.SVDEstimator, bound: float = 1e-9) -> None:
    assert got.factors.keys() <= expected.factors.keys()
    assert len(got.statistics) == len(got.factors) > 0
    for name, known in got.statistics.items():
        for a, b in zip(known, expected.statistics[name], strict=True):
            assert a.shape == b.shape and (not len(b) or oracle.difference(a, b) <= bound), name
        for a, b in zip(got.factors[name], expected.factors[name], strict=True):
            assert oracle.difference(a, b) <= bound, name


def channels(model: nn.Module, estimator: slx.SVDEstimator, data: dict[str, Any]) -> Any:
    """What an estimator that was built before chooses, at the start of training."""
    plan = slx.SparsityPlan(KEYS, tokens="all", channel_multiple=1, start_step=0)
    slx.compile(model, estimator, plan=plan, backend="aot_eager")
    with slx.record(model) as record:
        oracle.step(model, data)
    slx.restore(model)
    return as_lists(record)


def as_lists(record: slx.Recording) -> Any:
    return {n: {c: i.tolist() for c, i in found.items()} for n, found in record.selections.items()}
