"""Gathers and takes move up to the producers, so that nothing outside the selection is computed."""

from __future__ import annotations

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from tests.support import oracle
from tests.support.rewritten_graphs import count, rewritten
from tests.support.token_batches import ragged


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_the_hidden_width_of_an_ffn_without_adapters_is_never_made(
    monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    plan = slx.SparsityPlan({"mlp": 0.5}, tokens=tokens, start_step=0, channel_multiple=1)
    graph, report = rewritten(monkeypatch, model, ragged(), plan)
    assert report.counts["hoist_channel_gathers"] > 0
    assert count(graph, OPS.scatter_channels.default) == 0
    assert count(graph, OPS.gather_channels.default) == 0
    # One merge, after the down projection: tokens stay apart between the projections.
    assert count(graph, OPS.scatter_two_lists.default) == (tokens == "context")


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
    assert count(graph, OPS.gather_tokens.default) == 2  # context rows, output rows
