"""An automatic plan: in stages, from deep feed-forwards to attention, while all is quiet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.plan.plan import Sparsity
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.watch.stages import Stages, stages_of
from tests.support import oracle
from tests.support.tiny_models import tiny


def stages(layers: int) -> tuple[Stages, dict[str, Sparsity]]:
    model = oracle.llama(layers=layers)
    frozen = frozen_weights(model)
    planned = slx.SparsityPlan.auto().resolve(frozen, [n for n, _ in model.named_modules()])
    return stages_of(frozen, planned), planned


def test_stages_grow_from_deep_feed_forwards_to_the_whole_plan() -> None:
    found, planned = stages(9)
    allowed = [
        {n: s.scaled(1.0, at_most=caps.get(n)) for n, s in planned.items()} for caps in found.caps
    ]
    blocks = [
        sorted({int(n.split(".layers.")[1].split(".")[0]) for n, s in own.items() if s.ffn > 0})
        for own in allowed
    ]
    assert blocks == [[6, 7], [5, 6, 7], [2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]
    assert [any(s.attention for s in own.values()) for own in allowed] == [False] * 3 + [True]
    assert allowed[-1] == planned


def test_a_stage_that_drifts_at_once_is_left_for_good() -> None:
    found, _ = stages(9)
    assert found.climb() and found.at == 1
    assert found.climb() and found.at == 2 and not found.proven
    assert found.retreat() and found.at == 1
    assert not found.climb() and not found.retreat()
    proven, _ = stages(9)
    assert proven.climb() and proven.climb() and proven.at == 2
    proven.proven = True
    assert not proven.retreat()


def train(model: torch.nn.Module, steps: int) -> None:
    for n in range(steps):
        slx.step(model, n, steps)
        model(**oracle.batch(seed=n)).loss.backward()
        model.zero_grad()


@pytest.mark.slow
def test_a_quiet_run_climbs_to_the_plan_and_keeps_it_in_a_file(tmp_path: Path) -> None:
    model = oracle.llama(layers=3)
    plan = slx.SparsityPlan.auto(tokens="all", start_step=0, channel_multiple=1, min_steps=0)
    watch = slx.Watch(every=1, tolerance=100, mode="adapt", quiet=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", watch=watch)
    train(model, 4)
    drift = slx.drift(model)
    assert [p.action for p in drift.probes if p.action] == [
        "up: stage 2 of 2 (quiet)",
    ]
    assert drift.levels == {
        "model.layers.1.mlp": 0.75,
        "model.layers.1.self_attn": 0.25,
    }
    drift.plan.to_yaml(tmp_path / "plan.yaml")
    kept = slx.SparsityPlan(tmp_path / "plan.yaml")
    assert kept == drift.plan and kept.sparsity == drift.levels and kept.max_loss_gap is None


def test_compile_watches_such_a_plan_by_itself() -> None:
    """The first sparse step is probed, and the next one is not due."""
    model = tiny(3, channels=112)
    slx.compile(model, oracle.estimator_of(model), backend="eager")
    assert get_runtime(model).plan == slx.SparsityPlan.auto(), "what compile takes without a plan"
    plan = slx.SparsityPlan.auto(1e-7, tokens="all", start_step=0, channel_multiple=1, min_steps=0)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    train(model, 2)
    (probe,) = slx.drift(model).probes
    assert list(probe.regions) == ["layers.1.mlp"]
    with pytest.raises(slx.WatchError, match="mode is 'observe'"):
        slx.compile(
            model, oracle.estimator_of(model), plan=plan, backend="eager", watch=slx.Watch()
        )
