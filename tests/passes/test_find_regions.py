"""Which sites share a choice of channels, and why others do not; the graph stays as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.graph.layout import ChannelMap
from sparselora_fx.ir.markers import SiteSpec
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support.small_graphs import Small, after, changes_nothing, fresh, text

HEADS, KV_HEADS, DIM = 4, 2, 3


def found(rewrite: Rewrite) -> int:
    """Regions found, without a change of the graph."""
    after(rewrite, find_sites)
    before = text(rewrite)
    regions = after(rewrite, find_regions)
    assert text(rewrite) == before
    changes_nothing(fresh(rewrite), find_regions)
    return regions


def rows_of(rewrite: Rewrite) -> dict[tuple[str, str], list[ChannelMap]]:
    """The rows that each choice of the only region selects, by choice and weight."""
    (region,) = rewrite.regions
    return {
        (choice.name, pick.site.weight.name): list(pick.maps)
        for choice in region.choices
        for pick in choice.producers
    }


@pytest.mark.parametrize(("multiple", "kept"), [(1, 8), (6, 12), (16, 16)])
def test_a_gated_ffn(multiple: int, kept: int) -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    gate = small.call(F.silu, small.site(x, "gate", 16))
    h = small.call(torch.mul, gate, small.site(x, "up", 16))
    rewrite = small.rewrite(small.site(h, "down", 8), options=Options(channel_multiple=multiple))
    if kept == 16:
        assert found(rewrite) == 0
        assert {skip.reason for skip in rewrite.skips} == {"k rounds up to all of its channels"}
        return
    assert found(rewrite) == 1
    (region,) = rewrite.regions
    assert (region.kind, [c.weight.name for c in region.consumers]) == ("ffn", ["down"])
    assert [(c.name, c.channels, c.kept) for c in region.choices] == [("ffn", 16, kept)]
    one = [ChannelMap(1, 1, 0)]
    assert rows_of(rewrite) == {("ffn", "gate"): one, ("ffn", "up"): one}
    assert not rewrite.skips


@pytest.mark.parametrize("spelled", ["halves", "every other"])
def test_a_fused_gate(spelled: str) -> None:
    small = Small()
    fused = small.site(small.input("x", 2, 3, 8), "fused", 32)
    halves = spelled == "halves"
    keys = (slice(16), slice(16, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
    gate, up = (small.call(operator.getitem, fused, (Ellipsis, key)) for key in keys)
    h = small.call(torch.mul, small.call(F.silu, gate), up)
    rewrite = small.rewrite(small.site(h, "down", 8))
    assert found(rewrite) == 1
    maps = [(1, 1, 0), (1, 1, 16)] if halves else [(1, 2, 0), (1, 2, 1)]
    assert rows_of(rewrite) == {("ffn", "fused"): [ChannelMap(*m) for m in maps]}


def heads(small: Small, y: fx.Node, number: int) -> fx.Node:
    return small.call("transpose", small.call("view", y, 2, 5, number, DIM), 1, 2)


def attention(small: Small, x: fx.Node, *, written_out: bool = False) -> fx.Node:
    """Grouped heads, fused or written out, up to the output projection's input."""
    q = heads(small, small.site(x, "q", HEADS * DIM), HEADS)
    k, v = (heads(small, small.site(x, name, KV_HEADS * DIM), KV_HEADS) for name in "kv")
    k, v = (small.call("repeat_interleave", t, HEADS // KV_HEADS, dim=1) for t in (k, v))
    if written_out:
        scores = small.call(torch.matmul, q, small.call("transpose", k, -1, -2))
        mixed = small.call(torch.matmul, small.call(F.softmax, scores, dim=-1), v)
    else:
        mixed = small.call(F.scaled_dot_product_attention, q, k, v)
    return small.call("reshape", small.call("transpose", mixed, 1, 2), 2, 5, HEADS * DIM)


@pytest.mark.parametrize("written_out", [False, True])
def test_an_attention_with_grouped_heads(written_out: bool) -> None:
    small = Small()
    x = small.input("x", 2, 5, 8)
    rewrite = small.rewrite(small.site(attention(small, x, written_out=written_out), "o", 8))
    assert found(rewrite) == 1
    (region,) = rewrite.regions
    assert (region.kind, [c.weight.name for c in region.consumers]) == ("attention", ["o"])
    assert [(c.name, c.channels, c.kept) for c in region.choices] == [("qk", 6, 3), ("v", 6, 3)]
    shared = [ChannelMap(DIM, 2 * DIM, 0), ChannelMap(DIM, 2 * DIM, DIM)]
    assert rows_of(rewrite) == {
        ("qk", "q"): shared,  # two query heads share each channel of a key head
        ("qk", "k"): [ChannelMap(DIM, DIM, 0)],
        ("v", "v"): [ChannelMap(DIM, DIM, 0)],
    }
    assert [list(pick.maps) for pick in region.consumed] == [shared]


def test_consumers_of_one_hidden_state_share_a_region() -> None:
    """Whatever functions they read it through, and in whichever order the producers stand."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    gate, up = small.site(x, "gate", 16), small.site(x, "up", 16)
    h = small.call(torch.mul, small.call(F.silu, gate), up)
    other = small.call(torch.mul, up, small.call(F.gelu, gate))
    ends = [small.site(h, "down", 8), small.site(h, "more", 4), small.site(other, "third", 8)]
    rewrite = small.rewrite(*ends)
    assert found(rewrite) == 1
    (region,) = rewrite.regions
    assert [site.weight.name for site in region.producers] == ["gate", "up"]
    assert [site.weight.name for site in region.consumers] == ["down", "more", "third"]


def of_one_alone(small: Small, x: fx.Node) -> tuple[Any, ...]:
    gate = small.call(F.silu, small.site(x, "gate", 16))
    h = small.call(torch.mul, gate, small.site(x, "up", 16))
    return small.site(h, "down", 8), small.site(gate, "more", 8)


def both_halves(small: Small, x: fx.Node) -> tuple[Any, ...]:
    h = small.call(F.silu, small.site(x, "up", 32))
    parts = [small.call(operator.getitem, h, (..., s)) for s in (slice(16), slice(16, None))]
    return tuple(
        small.site(part, name, 8) for part, name in zip(parts, ("down", "more"), strict=True)
    )


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (of_one_alone, "its channels are also read by linear"),
        (both_halves, "some rows of its producer are used by something else"),
    ],
)
def test_consumers_of_other_channels_stay_dense(build: Any, reason: str) -> None:
    small = Small()
    rewrite = small.rewrite(*build(small, small.input("x", 2, 3, 8)))
    assert found(rewrite) == 0
    assert reason in {skip.weight.name: skip.reason for skip in rewrite.skips}["down"]


def also_returned(small: Small, x: fx.Node) -> tuple[Any, ...]:
    up = small.site(x, "up", 16)
    return small.site(small.call(F.silu, up), "down", 8), up


def shape_alone(small: Small, x: fx.Node) -> tuple[Any, ...]:
    up = small.site(x, "up", 16)
    return small.site(small.call(F.silu, up), "down", 8), small.call("size", up, 0)


def mixed(small: Small, x: fx.Node) -> tuple[Any, ...]:
    up = small.site(x, "up", 16)
    return (small.site(small.call("cumsum", up, -1), "down", 8),)


def flipped(small: Small, x: fx.Node) -> tuple[Any, ...]:
    up = small.site(x, "up", 16)
    return (small.site(small.call("flip", small.call(F.silu, up), -1), "down", 8),)


def half_used(small: Small, x: fx.Node) -> tuple[Any, ...]:
    half = small.call(operator.getitem, small.site(x, "up", 32), (Ellipsis, slice(16)))
    return (small.site(small.call(F.silu, half), "down", 8),)


def softmaxed(small: Small, x: fx.Node) -> tuple[Any, ...]:
    return (small.site(small.call(F.softmax, small.site(x, "up", 16), dim=-1), "down", 8),)


def residual(small: Small, x: fx.Node) -> tuple[Any, ...]:
    wide = small.call(torch.cat, (x, x), -1)
    h = small.call(torch.add, small.call(F.silu, small.site(x, "up", 16)), wide)
    return (small.site(h, "down", 8),)


def kept_dense(small: Small, x: fx.Node) -> tuple[Any, ...]:
    spec = SiteSpec(0.0, 0.5).encode()
    return (small.site(small.call(F.silu, small.site(x, "up", 16, spec=spec)), "down", 8,
                       spec=spec),)  # fmt: skip


def unlike(small: Small, x: fx.Node) -> tuple[Any, ...]:
    up = small.site(x, "up", 16, spec=SiteSpec(0.25, 0.5).encode())
    return (small.site(small.call(F.silu, up), "down", 8),)


REASONS = {
    also_returned: "its channels are also read by the graph's output",
    mixed: "no function, channel by channel",
    flipped: "no function, channel by channel",
    half_used: "some rows of its producer are used by something else",
    softmaxed: "no function, channel by channel",
    residual: "cannot be replayed on scores",
    kept_dense: "the plan keeps it dense (sparsity 0)",
    unlike: "different sparsities: [0.25, 0.5]",
}


@pytest.mark.parametrize(("build", "reason"), REASONS.items())
def test_near_misses_say_why(
    build: Callable[[Small, fx.Node], tuple[Any, ...]], reason: str
) -> None:
    small = Small()
    rewrite = small.rewrite(*build(small, small.input("x", 2, 3, 8)))
    assert found(rewrite) == 0
    reasons = {skip.weight.name: skip.reason for skip in rewrite.skips}
    assert set(reasons) == {"up", "down"}
    assert reason in reasons["down"]


def test_whoever_asks_for_the_shape_alone_reads_no_channels() -> None:
    small = Small()
    assert found(small.rewrite(*shape_alone(small, small.input("x", 2, 3, 8)))) == 1


def test_a_linear_serves_one_choice() -> None:
    """Of linears in a row the first two make a region; the third stays dense."""
    small = Small()
    first = small.call(F.silu, small.site(small.input("x", 2, 3, 8), "first", 16))
    second = small.call(F.silu, small.site(first, "second", 12))
    rewrite = small.rewrite(small.site(second, "third", 8))
    assert found(rewrite) == 1
    assert {site.weight.name for site in rewrite.regions[0].sites} == {"first", "second"}
    (skip,) = rewrite.skips
    assert skip.weight.name == "third" and "also belongs to another region" in skip.reason
