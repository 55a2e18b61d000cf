"""Each rule by which a channel gather moves up, what holds one back, and what that makes of whole
models."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.hoist_channel_gathers import hoist_channel_gathers
from tests.support import oracle
from tests.support.gathered_graphs import Selected
from tests.support.rewritten_graphs import count, rewritten
from tests.support.small_graphs import changes_nothing, keeps_values, shown, text
from tests.support.token_batches import ragged


def test_the_example_of_the_docstring() -> None:
    small = Selected()
    whole = small.scatter(small.kept(3))
    h = small.call(F.silu, small.call(torch.add, whole, small.input("b", 8, trains=True)))
    rewrite = small.rewrite(small.gather(h))
    assert keeps_values(rewrite, hoist_channel_gathers) == 3
    assert text(rewrite) == shown("""
        v0 = topk_channels(scores, 3)
        v1 = gather_channels(b, v0)
        v2 = neg(c)
        v3 = add(v2, v1)
        v4 = silu(v3)
        return (v4)
    """)
    changes_nothing(rewrite, hoist_channel_gathers)


Build = Callable[[Selected], fx.Node]
RULES: dict[str, tuple[Build, str]] = {
    "a LoRA up-projection": (
        lambda s: s.gather(s.linear(s.x, s.input("B", 8, 8, trains=True), s.input("bias", 8))),
        "v1 = sliced_linear(x, B, v0); v2 = gather_channels(bias, v0); "
        "v3 = add(v1, v2); return (v3)",
    ),
    "half of a fused projection": (
        lambda s: s.gather(
            s.call(operator.getitem, s.input("wide", 2, 3, 16), (Ellipsis, slice(8, None)))
        ),
        "v1 = channel_rows(v0, 1, 1, [8]); v2 = gather_channels(wide, v1); return (v2)",
    ),
    "every other channel": (
        lambda s: s.gather(
            s.call(operator.getitem, s.input("wide", 2, 3, 16), (Ellipsis, slice(1, None, 2)))
        ),
        "v1 = channel_rows(v0, 1, 2, [1]); v2 = gather_channels(wide, v1); return (v2)",
    ),
    "flattened tokens": (
        lambda s: s.gather(s.call("reshape", s.x, 6, 8)),
        "v1 = gather_channels(x, v0); v2 = reshape(v1, (6, 3)); return (v2)",
    ),
    "round trip": (
        lambda s: s.gather(s.scatter(s.kept(3))),
        "v1 = neg(c); return (v1)",
    ),
    "a part of the round trip": (
        lambda s: s.gather(s.scatter(s.kept(6), 16, s.rows(0, 8)), s.rows(8)),
        "v1 = neg(c); v2 = channel_rows(v0, 1, 1, [0, 8]); v3 = channel_rows(v0, 1, 1, [8]); "
        "v4 = narrow(v1, -1, 3, 3); return (v4)",
    ),
    "a value for each token": (
        lambda s: s.gather(s.call(torch.mul, s.x, s.input("m", 2, 3, 1, trains=True))),
        "v1 = gather_channels(x, v0); v2 = mul(v1, m); return (v2)",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    build, expected = RULES[rule]
    small = Selected()
    rewrite = small.rewrite(build(small))
    assert keeps_values(rewrite, hoist_channel_gathers) == 1
    assert text(rewrite).splitlines()[1:] == expected.split("; ")
    changes_nothing(rewrite, hoist_channel_gathers)


STAYS: dict[str, Build] = {
    "softmax over channels": lambda s: s.gather(s.call(F.softmax, s.x, dim=-1)),
    "cumulative": lambda s: s.gather(s.call("cumsum", s.x, -1)),
    "another selection": lambda s: s.gather(
        s.scatter(s.x, 16, s.call(OPS.topk_channels.default, s.input("others", 16), 8))
    ),
    "rows that were not scattered": lambda s: s.gather(
        s.scatter(s.kept(3), 16, s.rows(0)), s.rows(8)
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_near_misses_stay(name: str) -> None:
    small = Selected()
    changes_nothing(small.rewrite(STAYS[name](small)), hoist_channel_gathers)


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
