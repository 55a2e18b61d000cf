"""Plans from a sensitivity table: the best levels under a budget, against brute force."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.plan import budget
from sparselora_fx.plan.sensitivity_table import Measurement
from tests.support import oracle
from tests.support.measured_models import measure


def table_of(rows: list[tuple[str, float, float, int]], base: int = 1000) -> slx.SensitivityTable:
    made = tuple(
        Measurement(name, "ffn", level, 2 + change, change, saved, (name,))
        for name, level, change, saved in rows
    )
    return slx.SensitivityTable(made, 2.0, base, 1.0, "context", 16)


def random_table(seed: int, regions: int = 5) -> slx.SensitivityTable:
    draw = random.Random(seed)
    rows = []
    for r in range(regions):
        for level in (0.3, 0.6, 0.9):
            rows.append((f"r{r}", level, draw.uniform(-0.05, 0.4), int(190 * level) + 3 * r))
    return table_of(rows)


def every_choice(table: slx.SensitivityTable) -> list[tuple[int, float]]:
    """(saved, harm) of all combinations, by enumeration."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for row in table.rows:
        groups.setdefault(row.region, [(0, 0.0)]).append((row.saved, abs(row.loss_change)))
    return [
        (sum(s for s, _ in combination), sum(h for _, h in combination))
        for combination in itertools.product(*groups.values())
    ]


def totals(choice: budget.Choice) -> tuple[int, float]:
    return sum(r.saved for r in choice.rows), sum(abs(r.loss_change) for r in choice.rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("flops", [0.9, 0.6, 0.35])
def test_least_loss_for_a_flops_budget(seed: int, flops: float) -> None:
    table = random_table(seed)
    saved, harm = totals(budget.choose(table, flops=flops))
    best = min(h for s, h in every_choice(table) if s >= (1 - flops) * 1000)
    assert saved >= (1 - flops) * 1000
    assert harm == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_loss", [0.0, 0.1, 0.5])
def test_most_saved_for_a_loss_budget(seed: int, max_loss: float) -> None:
    table = random_table(seed)
    choice = budget.choose(table, max_loss=max_loss)
    assert sum(row.loss_change for row in choice.rows) <= max_loss
    assert totals(choice)[0] == max(s for s, h in every_choice(table) if h <= max_loss)


def test_greedy_would_be_wrong_here() -> None:
    """Cheapest work first takes "a" and then "b" (0.11); "c" alone is enough, at 0.105."""
    table = table_of([("a", 0.5, 0.01, 100), ("b", 0.5, 0.1, 450), ("c", 0.5, 0.105, 500)])
    assert [row.region for row in budget.choose(table, flops=0.5).rows] == ["c"]


def test_gains_neither_pay_for_harm_nor_come_free() -> None:
    table = table_of([("gain", 0.5, -1.0, 100), ("harm", 0.5, 0.5, 100), ("calm", 0.5, -0.1, 9)])
    assert [r.region for r in budget.choose(table, max_loss=0.6).rows] == ["harm", "calm"]
    assert [r.region for r in budget.choose(table, flops=0.9).rows] == ["harm"]


def test_a_nan_loss_is_no_choice() -> None:
    table = table_of([("a", 0.5, float("nan"), 900), ("b", 0.5, 0.1, 100)])
    assert [r.region for r in budget.choose(table, max_loss=9.0).rows] == ["b"]


def test_many_equal_blocks_are_quick_and_exact() -> None:
    """80 blocks, two kinds, four levels: the frontier stays short of being thinned."""
    rows = []
    for block in range(80):
        for kind, width in (("mlp", 7), ("attn", 2)):
            for level in (0.25, 0.5, 0.75, 0.9):
                change = 0.001 * (1 + (block * 7 + len(kind)) % 11) * level**2
                rows.append((f"{block}.{kind}", level, change, int(width * level * 100)))
    table = table_of(rows, base=80 * 900)
    saved, _ = totals(budget.choose(table, flops=0.5))
    assert saved >= 0.5 * table.base_flops


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"flops": 0.5, "max_loss": 0.1}, "exactly one"),
        ({"flops": 1.5}, "flops"),
        ({"flops": True}, "flops"),
        ({"max_loss": -0.1}, "max_loss"),
        ({"flops": 0.01}, "cannot be reached.*0.5"),
    ],
)
def test_bad_budgets_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(slx.PlanError, match=words):
        slx.SparsityPlan.from_sensitivity(table_of([("a", 0.5, 0.1, 500)]), **options)


@pytest.mark.slow
def test_a_functions_table_needs_the_function_again() -> None:
    def mask(arguments: dict[str, Any]) -> torch.Tensor:
        return torch.ones_like(arguments["input_ids"], dtype=torch.bool)

    table = measure(oracle.llama(), tokens=mask)
    with pytest.raises(slx.PlanError, match="tokens="):
        slx.SparsityPlan.from_sensitivity(table, flops=0.8)
    assert slx.SparsityPlan.from_sensitivity(table, flops=0.8, tokens=mask).tokens is mask


@pytest.mark.slow
def test_the_plan_saves_what_was_asked_when_it_runs() -> None:
    """Count the rows and columns that a compiled training step really uses."""
    model = oracle.llama(layers=2)
    table = measure(model, tokens="all")
    plan = slx.SparsityPlan.from_sensitivity(table, flops=0.6, start_step=0)
    assert (plan.tokens, plan.channel_multiple, plan.start_step) == ("all", 1, 0)
    got = oracle.run_compiled(model, oracle.batch(), plan, "eager")
    base = {n: m.weight.shape for n, m in model.named_modules() if n.endswith("base_layer")}
    used = 0
    for name, (rows, columns) in base.items():
        role, kept = got.record.sites.get(name, ("", ()))
        used += (len(kept) if role == "out" else rows) * (len(kept) if role == "in" else columns)
    total = sum(a * b for a, b in base.values())
    assert total == table.base_flops and 0.3 < used / total <= 0.6
