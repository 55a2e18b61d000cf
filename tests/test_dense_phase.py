"""Calibration from the dense phase: what is observed, what is built from it, and when."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.dense_phase import Collector
from sparselora_fx.recording import get_state

KEYS = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}


def plan_of(start: Any = 3, **options: Any) -> slx.SparsityPlan:
    options = {"tokens": "all", "channel_multiple": 1, "rank": 4, **options}
    return slx.SparsityPlan(KEYS, start_step=start, calibrate="dense_phase", **options)


def compiled(model: nn.Module, plan: slx.SparsityPlan | None = None, **options: Any) -> nn.Module:
    options = {"backend": "aot_eager", **options}
    return slx.compile(model, plan=plan or plan_of(), **options)


def collector_of(model: nn.Module) -> Collector:
    found = get_state(model).collector
    assert found is not None
    return found


def batches(count: int = 3) -> list[dict[str, Any]]:
    """Batches of different lengths, with padding and labels on the last few tokens."""
    made = [oracle.batch(2, 9 + 4 * i, padding=2 + i, seed=30 + i) for i in range(count)]
    for data in made:
        data["labels"][:, :-5] = -100
    return made


def run_dense_phase(model: nn.Module, data: list[dict[str, Any]]) -> None:
    for n, one in enumerate(data):
        slx.step(model, n)
        oracle.step(model, one)


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


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_statistics_and_factors_are_those_of_an_offline_calibration(regional: bool) -> None:
    model = oracle.llama(bias=True, dtype=torch.float64)
    expected = offline(model, batches())
    compiled(model, regional=regional)
    run_dense_phase(model, batches())
    collector = collector_of(model)
    assert collector.calls == 3 and list(collector.readers.values()) == [
        [f"model.layers.0.self_attn.{w}_proj" for w in "qkv"],
        ["model.layers.0.self_attn.o_proj"],
        ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        ["model.layers.0.mlp.down_proj"],
    ]
    assert_same(collector.build(), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_dense_phase_is_plain_compile_bit_for_bit(backend: str) -> None:
    model, data = oracle.llama(layers=2, dropout=0.1), batches(1)[0]
    plain = oracle.plain_compiled_step(model, data, backend)
    compiled(model, backend=backend)
    slx.step(model, 0)
    oracle.assert_identical(oracle.step(model, data), plain)
    assert collector_of(model).calls == 1 and len(collector_of(model).moments) == 4


def test_sliced_equals_masked_dense_after_the_switch() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches()
    expected = offline(model, data)
    compiled(model)
    run_dense_phase(model, data)
    slx.step(model, 3)
    with slx.record(model) as record:
        done = oracle.step(model, data[0])
    slx.restore(model)
    oracle.assert_rewrote(record, model, KEYS)
    oracle.assert_close(done, oracle.reference_step(model, data[0], record), 1e-9)
    # And the channels are those that the estimator built offline chooses.
    slx.compile(
        model, expected, backend="aot_eager",
        plan=slx.SparsityPlan(KEYS, tokens="all", channel_multiple=1, start_step=0),
    )  # fmt: skip
    with slx.record(model) as again:
        oracle.assert_identical(oracle.step(model, data[0]), done)
    assert again.sites.keys() == record.sites.keys()
