"""Sensitivity by domain: a table for each, and a plan that every one of them bears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparselora_fx as slx
from sparselora_fx.plan.sensitivity_table import Measurement
from tests.support import oracle
from tests.support.measured_models import batches, measure


def table_of(*changes: float) -> slx.SensitivityTable:
    """Regions "r0", "r1", ... at level 0.5; each saves 100 of 1000."""
    rows = tuple(
        Measurement(f"r{i}", "ffn", 0.5, 2 + change, change, 100, (f"r{i}",))
        for i, change in enumerate(changes)
    )
    return slx.SensitivityTable(rows, 2.0, 1000, 1.0, "context", 16)


def test_the_worst_case_keeps_every_domain_within_the_budget() -> None:
    """Each domain alone would bear two regions; together they bear one."""
    tables = slx.DomainTables({"en": table_of(0.01, 0.01, 0.5), "ja": table_of(-0.3, 0.01, 0.01)})
    changes = [row.loss_change for row in tables.worst_case().rows]
    assert changes == [-0.3, 0.01, 0.5]
    plan = slx.SparsityPlan.from_sensitivity(tables, max_loss=0.02, worst_case=True)
    assert plan.sparsity == {"r0": 0.0, "r1": 0.5, "r2": 0.0}
    for domain in tables:
        alone = slx.SparsityPlan.from_sensitivity(tables[domain], max_loss=0.02)
        assert sum(1 for s in alone.sparsity.values() if s) == 2


def test_a_domain_without_a_number_rules_a_region_out() -> None:
    tables = slx.DomainTables({"a": table_of(0.01), "b": table_of(float("nan"))})
    with pytest.raises(slx.PlanError):
        slx.SparsityPlan.from_sensitivity(tables, flops=0.95, worst_case=True)


@pytest.mark.slow
def test_measured_tables_are_those_of_each_domain_alone(tmp_path: Path) -> None:
    model = oracle.llama()
    domains = {"one": batches(), "two": batches((9, 9))}
    options: dict[str, Any] = {"backend": "eager", "channel_multiple": 1, "progress": False}
    estimator = oracle.estimator_of(model)
    found = slx.sensitivity(model, estimator, domains, (0.5,), **options)
    assert isinstance(found, slx.DomainTables) and list(found) == ["one", "two"]
    alone = slx.sensitivity(model, estimator, domains["two"], (0.5,), **options)
    assert isinstance(alone, slx.SensitivityTable)
    assert [r.loss for r in found["two"].rows] == pytest.approx([r.loss for r in alone.rows])
    assert found["one"].dense_loss != found["two"].dense_loss
    found.save(tmp_path)
    assert slx.SensitivityTable.load(tmp_path / "one.json") == found["one"]
    assert "[two]" in str(found)


def test_wrong_domains_are_typed_errors() -> None:
    tables = slx.DomainTables({"a": table_of(0.01)})
    for table, worst in ((tables, False), (tables["a"], True)):
        with pytest.raises(slx.PlanError, match="worst_case"):
            slx.SparsityPlan.from_sensitivity(table, flops=0.95, worst_case=worst)
    model = oracle.llama()
    with pytest.raises(slx.SensitivityError, match="list of batches"):
        measure(model, batches()[0])
    with pytest.raises(slx.SensitivityError, match="no batch for 'x'"):
        measure(model, {"x": []})
    with pytest.raises(slx.SensitivityError, match="domains are named"):
        measure(model, {"a/b": batches()})
