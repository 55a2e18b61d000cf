"""What a predictor reads comes before the first producer, in an order that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.sink_producers import sink_producers
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after, changes_nothing, keeps_values, shown, text


def gated(late: Any, between: Any = None) -> Rewrite:
    """An FFN whose hidden state meets a side input that is computed after its producer."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    up = small.call(F.silu, small.site(x, "up", 16))
    more = between(small, x, up) if between is not None else ()
    h = small.call(torch.mul, up, late(small, x))
    rewrite = small.rewrite(small.site(h, "down", 8), *more)
    after(rewrite, find_sites)
    assert after(rewrite, find_regions) == 1
    return rewrite


def side(small: Small, x: fx.Node) -> fx.Node:
    return small.call(torch.sigmoid, small.call("mean", x, -1, keepdim=True))


def test_a_side_input_goes_first() -> None:
    rewrite = gated(side)
    assert keeps_values(rewrite, sink_producers) == 1
    assert text(rewrite) == shown("""
        v0 = mean(x, -1, keepdim=True)
        v1 = sigmoid(v0)
        v2 = linear(x, up, None)
        v3 = silu(v2)
        v4 = mul(v3, v1)
        v5 = linear(v4, down, None)
        return (v5)
    """)
    changes_nothing(rewrite, sink_producers)


def test_what_stands_right_stays() -> None:
    changes_nothing(gated(lambda small, x: 2.0), sink_producers)


def drawn(small: Small, x: fx.Node, up: fx.Node) -> tuple[fx.Node, ...]:
    """A random draw: its place among the others is part of what a seed means."""
    small.call(torch.rand, 3)
    return ()


def dropped(small: Small, x: fx.Node) -> fx.Node:
    return small.call(F.dropout, small.call("mean", x, -1, keepdim=True), 0.1)


@pytest.mark.parametrize("between", [drawn, lambda s, x, up: (s.call("mul_", x, 2.0),)])
def test_nothing_moves_past_a_write_or_an_unread_call(between: Any) -> None:
    changes_nothing(gated(side, between), sink_producers)


def test_a_draw_that_does_not_read_the_producer_keeps_its_place_among_draws() -> None:
    rewrite = gated(dropped)
    before = [n for n in rewrite.graph.nodes if n.target is F.dropout]
    assert after(rewrite, sink_producers) == 1
    assert [n for n in rewrite.graph.nodes if n.target is F.dropout] == before


def test_a_draw_of_the_producer_s_own_stays() -> None:
    """Moving it would change which draw comes first."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    up = small.call(F.dropout, small.site(x, "up", 16), 0.1)
    h = small.call(torch.mul, up, dropped(small, x))
    rewrite = small.rewrite(small.site(h, "down", 8))
    after(rewrite, find_sites, find_regions)
    changes_nothing(rewrite, sink_producers)
