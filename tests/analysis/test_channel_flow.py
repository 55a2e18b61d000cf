"""Which sites' channels each node holds, and in which layout."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.analysis.channel_values import AttentionLogits, Channels
from sparselora_fx.graph.layout import ChannelMap, channel_map
from sparselora_fx.passes.find_sites import find_sites
from tests.support.site_flow import ROWS, Build, flow, part
from tests.support.small_graphs import Small, after

LOST: dict[str, Build] = {
    "reordered": lambda s, y: s.call(operator.getitem, y, (Ellipsis, [3, 1, 5])),
    "by another tensor": lambda s, y: s.call(
        "index_select", y, -1, s.input("idx", 4, dtype=torch.int64)
    ),
    "mixed": lambda s, y: s.call("cumsum", y, -1),
    "flipped": lambda s, y: s.call("flip", y, -1),
    "a sum over channels": lambda s, y: s.call("sum", y, -1, keepdim=True),
}


@pytest.mark.parametrize("name", LOST)
def test_where_the_layout_is_lost_the_roots_are_kept(name: str) -> None:
    """Whoever reads such a value reads the site, wherever its channels are."""
    (value,), rewrite = flow(LOST[name])
    assert isinstance(value, Channels)
    assert value.roots == frozenset(rewrite.sites)
    assert all(port.layout is None for port in value.ports)


def test_functions_keep_places_and_are_no_moves() -> None:
    def square(small: Small, y: fx.Node) -> fx.Node:
        return small.call(torch.mul, small.call(F.silu, y), small.call("view", y, 2, 3, ROWS))

    def normed(small: Small, y: fx.Node) -> fx.Node:
        return small.call(F.layer_norm, y, (ROWS,))

    values, _ = flow(square, normed)
    for value in values:
        assert isinstance(value, Channels) and not value.moved
        assert [channel_map(p.layout) for p in value.ports] == [(ROWS, ChannelMap(1, 1, 0))]


def test_two_halves_meet_as_two_ports() -> None:
    def gated(small: Small, y: fx.Node) -> fx.Node:
        gate, up = (part(Ellipsis, key)(small, y) for key in (slice(6), slice(6, None)))
        return small.call(torch.mul, small.call(F.silu, gate), up)

    (value,), _ = flow(gated)
    assert [channel_map(p.layout) for p in value.ports] == [
        (6, ChannelMap(1, 1, 0)), (6, ChannelMap(1, 1, 6))
    ]  # fmt: skip


def test_a_value_of_lower_rank_is_broadcast_on_the_left() -> None:
    def added(small: Small, y: fx.Node) -> fx.Node:
        return small.call(torch.add, small.input("more", 4, 2, 3, ROWS), y)

    (value,), _ = flow(added)
    assert [channel_map(p.layout) for p in value.ports] == [(ROWS, ChannelMap(1, 1, 0))]


def test_a_branch_and_a_bias_leave_their_site_as_it_is() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    y = small.call(torch.add, small.site(x, "w", ROWS), small.lora(x, "w", ROWS))
    z = small.call(torch.add, y, small.input("b", ROWS))
    rewrite = small.rewrite(z)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    assert values[z] == values[rewrite.sites[0].node]
    assert not rewrite.sites[0].adapter_nodes & set(values)  # part of the site


def test_scores_and_what_becomes_of_them() -> None:
    def scores(small: Small, y: fx.Node) -> fx.Node:
        heads = small.call("transpose", small.call("view", y, 2, 3, 4, 3), 1, 2)
        raw = small.call(torch.matmul, heads, small.call("transpose", heads, -1, -2))
        return small.call(F.softmax, small.call(torch.mul, raw, 0.5), dim=-1)

    (value,), rewrite = flow(scores)
    assert isinstance(value, AttentionLogits) and value.roots == frozenset(rewrite.sites)


def test_shapes_and_writes_hold_no_channels() -> None:
    values, _ = flow(lambda s, y: s.call("size", y, 0))
    assert values == [None]


def test_pieces_of_other_values_are_segments() -> None:
    """Part of each head rotated, the rest beside it: which piece is whose."""

    def joined(small: Small, y: fx.Node) -> fx.Node:
        return small.call(torch.cat, [y, small.input("more", 2, 3, 5)], -1)

    (value,), _ = flow(joined)
    assert value.segments is not None and value.segments.axis == -1
    assert [(n, part is None) for n, part in value.segments.parts] == [(ROWS, False), (5, True)]


def test_more_tokens_beside_those_of_a_site() -> None:
    def longer(small: Small, y: fx.Node) -> fx.Node:
        return small.call(torch.cat, [small.input("learned", 2, 4, ROWS), y], 1)

    (value,), _ = flow(longer)
    (port,) = value.ports
    assert channel_map(port.layout) == (ROWS, ChannelMap(1, 1, 0))
    assert port.layout.dims[1][0].size == 7


AS_ANOTHER: dict[str, Build] = {
    "view_as": lambda s, y: s.call("view_as", s.input("z", 6, ROWS), y),
    "reshape_as": lambda s, y: s.call("reshape_as", s.input("z", 6, ROWS), y),
    "expand_as": lambda s, y: s.call("expand_as", s.input("z", ROWS), y),
    "type_as": lambda s, y: s.call("type_as", s.input("z", ROWS), y),
    "to": lambda s, y: s.call("to", s.input("z", ROWS), y),
    "zeros_like": lambda s, y: s.call(torch.zeros_like, y),
}


@pytest.mark.parametrize("name", AS_ANOTHER)
def test_who_asks_for_a_shape_alone_holds_no_channels(name: str) -> None:
    (value,), rewrite = flow(AS_ANOTHER[name])
    assert value is None and rewrite.sites


def test_a_value_is_laid_out_as_another_one() -> None:
    """The first operand is moved; the second is asked for its shape."""

    def flat(small: Small, y: fx.Node) -> fx.Node:
        return small.call("view_as", y, small.input("z", 6, ROWS))

    (value,), _ = flow(flat)
    assert [channel_map(p.layout) for p in value.ports] == [(ROWS, ChannelMap(1, 1, 0))]
