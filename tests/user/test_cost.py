"""The bill: counted FLOPs against a count by hand, times, break-even, and one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from benchmarks import cost
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.step_cost import StepFlops, StepTimes
from tests.support import oracle
from tests.support.tiny_models import tiny


def compiled(sparsity: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"tokens": "context", "start_step": 0, "channel_multiple": 1} | options
    model = oracle.llama(layers=2) if model is None else model
    return slx.compile(
        model, oracle.estimator_of(model), plan=slx.SparsityPlan(sparsity, **options),
        backend="eager",
    )  # fmt: skip


def batch(context: int = 12, length: int = 16) -> dict[str, Any]:
    data = oracle.batch(samples=2, length=length, padding=0)
    data["labels"][:, :context] = -100
    return data


@pytest.mark.slow
def test_flops_are_those_counted_by_hand() -> None:
    """Half of an FFN's 112 channels at 96 context tokens, forward and backward: in each of two
    samples 47 tokens before the first that predicts a label, and the last one."""
    model, data = (
        compiled({"layers.1.mlp": 0.5}, oracle.llama(layers=2, attention="eager")),
        batch(48, 64),
    )
    graphs = get_runtime(model).graphs
    flops = slx.cost(model, data, measure=False).flops
    assert (flops.tokens, flops.sparse_tokens, flops.sites) == (128, 96, 3)
    assert flops.saved == 3 * 96 * 2 * 2 * 48 * 56
    assert flops.predictor == 2 * 64 * 2 * 4 * (48 + 112)  # of 64 sampled tokens
    assert get_runtime(model).graphs == graphs
    slx.restore(model)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**data).loss.backward()
    assert flops.dense == counter.get_total_flops() > flops.dense - flops.saved > 0


def test_nothing_changes_and_the_format_holds() -> None:
    model = compiled(0.5, tiny(dropout=0.1, channels=112))
    torch.manual_seed(4)
    state, marks, weights = (
        torch.get_rng_state(),
        oracle.marks(model),
        oracle.copy_of_weights(model),
    )
    found = slx.cost(model, batch(), steps=100, price_per_hour=3600, watts=1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert {n: v[4] for n, v in oracle.marks(model).items() if isinstance(v, tuple)} == {
        n: v[4] for n, v in marks.items() if isinstance(v, tuple)
    }
    data = json.loads(json.dumps(found.to_json()))
    assert {"predicted_ratio", "measured_ratio", "break_even_steps", "verdict", "parts"} <= set(
        data
    )
    assert (
        data["predicted_ratio"] > 0 and data["measured_ratio"] > 0
    )  # little of both: rows that fill up
    assert data["parts"]["estimator_seconds"] > 0 and data["parts"]["memory_bytes"] > 0
    assert data["parts"]["compile_seconds"] > 0
    # 1 an hour is 3600 s; 1 kW: kWh are hours
    assert data["run"]["dense_money"] == pytest.approx(3600 * data["run"]["dense_hours"])
    assert data["run"]["dense_kwh"] == pytest.approx(data["run"]["dense_hours"])


FLOPS = StepFlops(1000, 500, 10, 0, 100, 80, 100, 6)


def billed(**changes: Any) -> slx.Cost:
    times = changes.pop("times", StepTimes(2.0, 1.0, 2.0))
    flops = changes.pop("flops", FLOPS)
    base = slx.Cost(flops, times, 30.0, 60.0, 0.1, 10, 1000, 0, 0.2)
    return replace(base, **changes)


def test_break_even_and_verdicts() -> None:
    """90 s of beginnings, 0.9 s saved a step: 100 steps after the 10 dense ones."""
    assert billed().break_even_steps == 110
    assert billed().verdict == "pays after 110 steps; 2.00x from there"
    assert billed(steps=50).verdict.startswith("does not pay in 50 steps: it would after 110")
    slow = billed(times=StepTimes(1.0, 1.05, 0.95))
    assert slow.break_even_steps is None and "1.05x the time" in slow.verdict
    full = billed(times=StepTimes(1.0, 1.05, 0.95), labelled_share=0.71)
    assert full.verdict == "does not pay: 71% of the batch's tokens carry loss"
    assert "nothing is sliced" in billed(flops=replace(FLOPS, sites=0)).verdict
    assert "is predicted to be 1.96x" in billed(times=None).verdict
    assert billed(times=None).measured_ratio is None
    beside = replace(FLOPS, dense_beside=10, sparse_beside=500)
    assert billed(flops=beside).predicted_ratio == pytest.approx(1010 / 1010)
    run = billed(steps=1000, price_per_hour=2.0, watts=500.0).run()
    assert run["dense_hours"] == pytest.approx(2000 / 3600)
    assert run["sparse_hours"] == pytest.approx((90 + 20 + 990 * 1.1) / 3600)
    assert run["sparse_money"] == pytest.approx(2 * (90 + 20 + 990 * 1.1) / 3600)


def test_a_batch_full_of_loss_does_not_pay() -> None:
    model = compiled(0.5, tiny())
    with pytest.warns(UserWarning, match="would be sparse"):
        found = slx.cost(model, batch(context=0, length=64), measure=False)
    assert found.predicted_ratio == 1.0 and found.labelled_share == 1.0
    assert found.verdict.startswith("does not pay: 100%")


def test_the_page_shows_how_good_predictions_were_and_they_were_good() -> None:
    root = Path(cost.__file__).parent
    found = json.loads((root / "results/cost.json").read_text(encoding="utf-8"))["cases"]
    page = (root.parent / "docs/operations.md").read_text(encoding="utf-8")
    assert cost.table(found) in page
    assert all(abs(row["error"]) <= 0.15 for row in found) and len(found) == 3


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(slx.CompileError, match="price_per_hour"):
        slx.cost(compiled(0.5), batch(), price_per_hour=-1.0)
