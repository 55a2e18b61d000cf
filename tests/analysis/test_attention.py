"""Attention in its spellings, by the channels of its operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.attention import operand_heads
from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.analysis.channel_values import Channels, attention_of
from sparselora_fx.analysis.regions import Attention
from sparselora_fx.graph.layout import Atom
from sparselora_fx.passes.find_sites import find_sites
from tests.support.layouts import rows_held
from tests.support.small_graphs import Small, after

HEADS, KV_HEADS, DIM = 4, 2, 3


def shared(small: Small, k: fx.Node, how: str) -> fx.Node:
    """Key heads ``[2, 2, 5, 3]`` for four query heads."""
    if how == "interleaved":  # k0 k0 k1 k1
        return small.call("repeat_interleave", k, 2, dim=1)
    if how == "expanded":
        wide = small.call("expand", small.call("unsqueeze", k, 2), 2, KV_HEADS, 2, 5, DIM)
        return small.call("reshape", wide, 2, HEADS, 5, DIM)
    return small.call("repeat", k, 1, 2, 1, 1)  # k0 k1 k0 k1


def mixed(how: str = "interleaved", spelled: str = "fused", **options: Any) -> tuple[Any, Any]:
    """The value and the heads of an attention with grouped heads."""
    small = Small()
    x = small.input("x", 2, 5, 8)

    def heads(name: str, number: int) -> fx.Node:
        y = small.site(x, name, number * DIM)
        if options.get("rotated") and name != "v":
            y = small.call(torch.mul, y, small.input(f"cos_{name}", 5, number * DIM))
        return small.call("transpose", small.call("view", y, 2, 5, number, DIM), 1, 2)

    q, k, v = heads("q", HEADS), heads("k", KV_HEADS), heads("v", KV_HEADS)
    k, v = shared(small, k, how), shared(small, v, options.get("values", how))
    if spelled == "fused":
        out = small.call(F.scaled_dot_product_attention, q, k, v)
    else:
        scores = small.call(torch.matmul, q, small.call("transpose", k, -1, -2))
        if spelled == "masked":
            scores = small.call(torch.add, scores, small.input("mask", 2, 1, 5, 5))
        out = small.call(torch.matmul, small.call(F.softmax, scores, dim=-1), v)
    rewrite = small.rewrite(out)
    after(rewrite, find_sites)
    value = propagate(rewrite.graph, rewrite.sites)[out]
    assert isinstance(value, Channels)
    return value, attention_of(value)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("spelled", ["fused", "written out", "masked"])
@pytest.mark.parametrize("how", ["interleaved", "expanded", "outer"])
def test_heads_and_the_order_they_are_shared_in(how: str, spelled: str, rotated: bool) -> None:
    value, found = mixed(how, spelled, rotated=rotated)
    assert isinstance(found, Attention)
    assert (found.heads, found.kv_heads, found.head_dim, found.value_dim) == (4, 2, 3, 3)
    assert [h.site.weight.name for h in (found.query, found.key, found.value)] == ["q", "k", "v"]
    assert found.group_inner == (how != "outer")
    assert {s.weight.name for s in found.roots} == {"q", "k", "v"}
    # Its output counts channels head by head.
    (port,) = value.ports
    expected = torch.arange(HEADS * DIM).view(HEADS, 1, DIM).expand(2, HEADS, 5, DIM)
    assert torch.equal(rows_held(port.layout), expected)


def test_keys_and_values_shared_in_other_orders_are_not_understood() -> None:
    value, found = mixed("interleaved", values="outer")
    assert found is None and value.ports == ()
    assert len(value.roots) == 3


def test_a_product_of_other_values_is_no_attention() -> None:
    """Nothing of a site on the right: no scores, and no layout."""
    small = Small()
    y = small.site(small.input("x", 2, 5, 8), "w", 12)
    out = small.call(torch.matmul, y, small.input("m", 2, 12, 5))
    rewrite = small.rewrite(out)
    after(rewrite, find_sites)
    value = propagate(rewrite.graph, rewrite.sites)[out]
    assert isinstance(value, Channels) and value.ports == ()


def test_heads_of_an_operand() -> None:
    small = Small()
    y = small.site(small.input("x", 2, 5, 8), "qkv", 3 * 4 * 3)
    cut = small.call("select", small.call("view", y, 2, 5, 4, 3, 3), 3, 1)  # [heads, (q, k, v), 3]
    keys = small.call("transpose", cut, 1, 2)
    turned = small.call("transpose", keys, -1, -2)
    rewrite = small.rewrite(turned)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    found = operand_heads(values[keys])  # type: ignore[arg-type]
    assert found is not None
    assert (found.offset, found.atoms, found.dim) == (3, (Atom(4, 9),), 3)
    assert operand_heads(values[turned]) is None  # type: ignore[arg-type]
