"""A plan with ``min_steps`` leaves trainings of fewer steps dense, and says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.cli.config import read_config
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, tokens="all", min_steps=4)


def compiled(plan: slx.SparsityPlan | None = PLAN) -> torch.nn.Module:
    model = oracle.llama(layers=3)
    return slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")


def losses(model: torch.nn.Module, total: int | None, steps: int = 2) -> list[torch.Tensor]:
    found = []
    for n in range(steps):
        if total is not None:
            slx.step(model, n, total)
        else:
            slx.step(model, n)
        loss = model(**oracle.batch(seed=n)).loss
        loss.backward()
        found.append(loss.detach())
        model.zero_grad()
    return found


def plain() -> list[torch.Tensor]:
    model = oracle.llama(layers=3)
    return [model(**oracle.batch(seed=n)).loss.detach() for n in range(2)]


def test_a_short_training_is_dense_and_one_warning_says_why() -> None:
    model = compiled()
    with pytest.warns(UserWarning, match="a training of 3 steps stays dense") as told:
        found = losses(model, 3)
    assert sum("min_steps" in str(one.message) for one in told) == 1
    torch.testing.assert_close(found, plain(), rtol=0, atol=0)
    text = " ".join(str(slx.explain(model)).split())
    assert "No: with 3 steps training stays dense (the plan's min_steps)" in text
    assert slx.cost(model, oracle.batch(), steps=3).dense_steps == 3


@pytest.mark.parametrize("total", [4, 100, None])
def test_others_are_sparse_without_a_word(total: int | None) -> None:
    model = compiled()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*min_steps")
        found = losses(model, total)
    assert all((a != b).item() for a, b in zip(found, plain(), strict=True))


def test_an_automatic_plan_is_for_long_trainings() -> None:
    assert slx.SparsityPlan.auto().min_steps == 1000
    assert slx.SparsityPlan.auto(min_steps=0).min_steps == 0
    assert slx.SparsityPlan(0.5).min_steps == 0
    model = compiled(None)
    with pytest.warns(UserWarning, match="of at least 1000"):
        losses(model, 999)
    assert not slx.drift(model).probes, "nothing is compared where nothing is sparse"
    losses(model, 1000)
    assert not get_runtime(model).stays_dense


def test_a_training_that_stays_dense_observes_nothing() -> None:
    model = slx.compile(oracle.llama(layers=3), backend="eager")
    with pytest.warns(UserWarning, match="stays dense"):
        losses(model, 20)
    assert "0 dense calls observed" in str(slx.explain(model))


def test_what_a_watch_ended_on_holds_for_any_length(tmp_path: Path) -> None:
    assert slx.drift(compiled(slx.SparsityPlan.auto())).plan.min_steps == 0
    PLAN.to_yaml(tmp_path / "plan.yaml")
    assert slx.SparsityPlan(tmp_path / "plan.yaml") == PLAN


@pytest.mark.parametrize("bad", [-1, 0.5, True, "many"])
def test_other_values_are_refused(bad: object) -> None:
    with pytest.raises(slx.PlanError, match="min_steps is"):
        slx.SparsityPlan(0.5, min_steps=bad)


def test_the_command_line_takes_the_same_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {train: t.jsonl}\n", encoding="utf-8")
    assert read_config(str(file)).plan == slx.SparsityPlan.auto()
    assert read_config(str(file), ["plan=default"]).plan == slx.SparsityPlan.default()
    assert read_config(str(file), ["plan=0.5"]).plan == slx.SparsityPlan(0.5)
