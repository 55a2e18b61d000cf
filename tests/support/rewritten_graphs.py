"""What tests share: rewritten graphs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

import sparselora_fx as slx
from sparselora_fx.compiler import backend
from sparselora_fx.compiler.report import GraphReport
from tests.support import oracle


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.Graph, GraphReport]]:
    """The graphs that are rewritten from now on, after every pass."""
    found: list[tuple[fx.Graph, GraphReport]] = []
    run = backend.run

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        report = run(gm, *args)
        if report is not None:
            found.append((gm.graph, report))
        return report

    monkeypatch.setattr(backend, "run", spy)
    return found


def rewritten(
    monkeypatch: pytest.MonkeyPatch, model: Any, data: Any, plan: Any, **options: Any
) -> tuple[fx.Graph, GraphReport]:
    """The graph of one sparse step after every pass."""
    found = watched(monkeypatch)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)
    oracle.step(model, data)
    slx.restore(model)
    assert len(found) == 1
    return found[0]


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))
