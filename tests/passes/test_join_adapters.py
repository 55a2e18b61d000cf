"""LoRA down-projections of one input are one matmul, where that keeps every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.join_adapters import join_adapters
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after, changes_nothing, keeps_values, shown, text

Change = Callable[[Small, fx.Node], fx.Node]


def gated(own: Change | None = None, between: Change | None = None) -> Rewrite:
    """``down(silu(gate(x)) * up(x))`` with LoRA on gate and up, ready for the pass. ``own``: what
    each branch does to x; ``between``: what comes between the branches."""
    small = Small()
    x = small.input("x", 2, 3, 8, trains=True)

    def linear(x: fx.Node, name: str) -> fx.Node:
        branch = small.lora(x if own is None else own(small, x), name, 16)
        return small.call(torch.add, small.site(x, name, 16), branch)

    gate = small.call(F.silu, linear(x, "gate"))
    if between is not None:
        gate = between(small, gate)
    h = small.call(torch.mul, gate, linear(x, "up"))
    rewrite = small.rewrite(small.site(h, "down", 8))
    after(rewrite, find_sites)
    assert after(rewrite, find_regions) == 1
    return rewrite


def test_two_branches_read_their_input_once() -> None:
    rewrite = gated()
    assert keeps_values(rewrite, join_adapters) == 2
    assert text(rewrite) == shown("""
        v0 = cat([gate_A, up_A])
        v1 = linear(x, v0)
        v2 = narrow(v1, -1, 0, 2)
        v3 = narrow(v1, -1, 2, 2)
        v4 = linear(v2, gate_B, None)
        v5 = linear(x, gate, None)
        v6 = add(v5, v4)
        v7 = silu(v6)
        v8 = linear(v3, up_B, None)
        v9 = linear(x, up, None)
        v10 = add(v9, v8)
        v11 = mul(v7, v10)
        v12 = linear(v11, down, None)
        return (v12)
    """)
    changes_nothing(rewrite, join_adapters)


def cast(small: Small, x: fx.Node) -> fx.Node:
    return small.call("to", x, torch.float64, copy=True)


def test_casts_alike_are_one_input() -> None:
    assert keeps_values(gated(own=cast), join_adapters) == 2


def dropped(small: Small, x: fx.Node) -> fx.Node:
    return small.call(F.dropout, x, 0.1)


def detached(small: Small, gate: fx.Node) -> fx.Node:
    return small.call("detach", gate)


def written(small: Small, gate: fx.Node) -> fx.Node:
    x = next(iter(small.graph.nodes))
    small.call("mul_", small.call("clone", x), 0.5)
    return gate


@pytest.mark.parametrize(
    "options", [{"own": dropped}, {"between": detached}, {"between": written}],
    ids=["own dropouts", "a gradient is cut", "a write between"],
)  # fmt: skip
def test_near_misses_stay(options: Any) -> None:
    changes_nothing(gated(**options), join_adapters)


def test_branches_of_no_region_stay() -> None:
    rewrite = gated()
    rewrite.regions.clear()
    changes_nothing(rewrite, join_adapters)
