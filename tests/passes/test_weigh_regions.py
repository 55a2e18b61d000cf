"""Regions whose slicing cannot pay at a batch's size stay dense, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselora_fx.analysis import costs
from sparselora_fx.analysis.costs import Rates
from tests.support import oracle
from tests.support.rewritten_graphs import rewritten
from tests.support.slow import slow

PLAN = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}
SLOW = Rates(flops=1e9, bytes=1e12, region=0.0)  # any multiplication saved is worth a copy


def weighed(
    monkeypatch: pytest.MonkeyPatch, rates: Rates | None, *, verify_speed: bool | None = True
) -> Any:
    table = {} if rates is None else {torch.float32: rates}
    monkeypatch.setattr(costs, "_CPU", table)
    _, report = rewritten(
        monkeypatch, oracle.llama(), oracle.batch(2, 12, padding=0), oracle.plan_of(PLAN),
        verify_speed=verify_speed,
    )  # fmt: skip
    return report


def test_regions_that_pay_are_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    report = weighed(monkeypatch, SLOW)
    assert {region.kind for region in report.regions} == {"ffn", "attention"}


def test_only_the_region_that_costs_more_than_it_saves_stays_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = 24 * 48 * 4 / 1e9 / 2  # half of the work on a channel of one matrix
    between = (saved * (2 * 48 + 2 * 16) + saved * 3 * 112) / 2
    report = weighed(monkeypatch, Rates(1e9, 1e12, between))
    assert [region.kind for region in report.regions] == ["ffn"]
    reasons = [site.reason for site in report.dense]
    assert sum("slicing cannot pay at this size: " in reason for reason in reasons) == 4


def test_copies_of_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    report = weighed(monkeypatch, Rates(1e15, 1e6, 0.0))
    assert report is None or not report.regions


@pytest.mark.parametrize("verify_speed", [False, slow(None)])
def test_nothing_is_weighed_where_speed_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, verify_speed: bool | None
) -> None:
    report = weighed(monkeypatch, Rates(1e15, 1e6, 1.0), verify_speed=verify_speed)
    assert len(report.regions) == 2


def test_a_device_that_was_not_measured_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    report = weighed(monkeypatch, None)
    assert len(report.regions) == 2


def test_a_step_with_a_region_left_dense_equals_masked_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "_CPU", {torch.float32: Rates(1e9, 1e12, 3e-4)})
    data, model = oracle.batch(2, 12), oracle.llama()
    done = oracle.run_compiled(
        model, data, oracle.plan_of(PLAN), verify_speed=True, backend="eager"
    )
    kinds = {name.rsplit(".", 2)[-2 if "base_layer" in name else -1] for name in done.record.sites}
    assert kinds == {"gate_proj", "up_proj", "down_proj"}
    oracle.assert_close(done, oracle.reference_step(model, data, done.record), 1e-5)
