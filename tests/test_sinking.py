"""Gathers and takes move up to the producers, so that nothing outside the selection is computed."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from test_tokens import ragged
from torch import fx

import sparselora_fx as slx
from sparselora_fx import backend
from sparselora_fx.ops import OPS
from sparselora_fx.pipeline import GraphReport


def rewritten(
    monkeypatch: pytest.MonkeyPatch, model: Any, data: Any, plan: Any, **options: Any
) -> tuple[fx.Graph, GraphReport]:
    """The graph of one sparse step after every pass."""
    found: list[tuple[fx.Graph, GraphReport]] = []
    run = backend.run

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        report = run(gm, *args)
        if report is not None:
            found.append((gm.graph, report))
        return report

    monkeypatch.setattr(backend, "run", spy)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)
    oracle.step(model, data)
    slx.restore(model)
    assert len(found) == 1
    return found[0]


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_the_hidden_width_of_an_ffn_without_adapters_is_never_made(
    monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    plan = slx.SparsityPlan({"mlp": 0.5}, tokens=tokens, start_step=0, channel_multiple=1)
    graph, report = rewritten(monkeypatch, model, ragged(), plan)
    assert report.counts["sink_gathers"] > 0
    assert count(graph, OPS.scatter_channels.default) == 0
    assert count(graph, OPS.gather_channels.default) == 0
    # One merge, after the down projection: tokens stay apart between the projections.
    assert count(graph, OPS.merge_tokens.default) == (tokens == "context")


def test_a_dense_branch_keeps_the_width_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.llama(layers=1, dtype=torch.float64)
    graph, _ = rewritten(monkeypatch, model, oracle.batch(), oracle.plan_of({"mlp": 0.5}))
    assert count(graph, OPS.scatter_channels.default) == 2


def test_gate_and_up_share_one_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read the context rows of one input: they are gathered once, and so is the gradient."""
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    plan = slx.SparsityPlan({"mlp": 0.5}, start_step=0, channel_multiple=1)
    graph, _ = rewritten(monkeypatch, model, ragged(samples=1), plan)  # without padding
    assert count(graph, OPS.sliced_linear.default) == 2
    assert count(graph, OPS.take_tokens.default) == 2  # context rows, output rows
