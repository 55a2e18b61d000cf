"""Markers become sites with their LoRA branches, and leave no trace in the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from sparselora_fx.ir.markers import DENSE, WITHOUT_GRADIENTS
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.find_sites import find_sites
from tests.support.small_graphs import (
    HALF,
    Small,
    after,
    changes_nothing,
    fresh,
    keeps_values,
    shown,
    text,
)


def test_a_linear_with_its_branch() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    y = small.site(x, "w", 16, bias=True)
    rewrite = small.rewrite(small.call(torch.add, y, small.lora(x, "w", 16)))
    assert keeps_values(rewrite, find_sites) == 1
    assert text(rewrite) == shown("""
        v0 = linear(x, w, w_bias)
        v1 = linear(x, w_A, None)
        v2 = linear(v1, w_B, None)
        v3 = add(v0, v2)
        return (v3)
    """)
    (site,) = rewrite.sites
    base, down, up, added = [n for n in rewrite.graph.nodes if n.op == "call_function"]
    assert (site.node, site.x.name, site.weight.name) == (base, "x", "w")
    assert site.bias is not None and site.bias.name == "w_bias"
    assert (site.out_features, site.in_features, site.transposed) == (16, 8, False)
    assert site.adapter_adds == {added: up} and site.adapter_nodes == {down, up}
    assert {w.target for w in site.adapter_weights} == {"w_A", "w_B"}
    changes_nothing(fresh(rewrite), find_sites)


def test_a_weight_stored_the_other_way_round() -> None:
    """``x @ w`` with ``w[K, N]``: the factors of ``w`` are those of its transpose, turned."""
    small = Small()
    x, w = small.input("x", 2, 3, 8), small.input("w", 8, 16)
    rewrite = small.rewrite(small.call(torch.matmul, small.marked(x, w), w))
    assert keeps_values(rewrite, find_sites) == 1
    (site,) = rewrite.sites
    assert site.transposed and (site.out_features, site.in_features) == (16, 8)
    a, b = site.factors
    assert [n.args[0].name for n in (a, b)] == ["w_fb", "w_fa"]
    assert [tuple(n.meta["example_value"].shape) for n in (a, b)] == [(16, 2), (2, 8)]


def test_a_bias_that_is_added_outside() -> None:
    small = Small()
    x, bias = small.input("x", 2, 3, 8), small.input("b", 16)
    added = small.call(torch.add, small.site(x, "w", 16), bias)
    rewrite = small.rewrite(added)
    after(rewrite, find_sites)
    assert rewrite.sites[0].bias_adds == {added}


def twice_on_one_input(small: Small, x: fx.Node) -> fx.Node:
    """As DoRA does: the products share a choice."""
    w = small.input("w", 16, 8)
    mark = small.marked(x, w)
    return small.call(torch.add, small.linear(mark, w), small.linear(mark, w))


def test_products_of_one_input_are_one_site() -> None:
    small = Small()
    rewrite = small.rewrite(twice_on_one_input(small, small.input("x", 2, 3, 8)))
    assert after(rewrite, find_sites) == 1
    assert [x.name for x in rewrite.sites[0].more.values()] == ["x"]


def twice(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 8, 8)
    y = small.linear(small.marked(x, w), w)
    return small.linear(small.call("neg", y), w)


def read_otherwise(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 16, 8)
    return small.call(torch.mul, small.marked(x, w), small.call(operator.getitem, w, 0))


def over_rows(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 3, 3)
    return small.call(torch.einsum, "blk,ml->bmk", small.marked(x, w), w)


def a_vector(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 16, 8)
    return small.linear(small.marked(small.call(operator.getitem, x, (0, 0)), w), w)


def trained(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 16, 8, trains=True)
    return small.linear(small.marked(x, w), w)


def gradientless(small: Small, x: fx.Node) -> fx.Node:
    w = small.input("w", 16, 8)
    return small.linear(small.marked(x, w, spec=WITHOUT_GRADIENTS), w)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (twice, "used more than once"),
        (read_otherwise, "is not a linear"),
        (over_rows, "einsum with this weight is not a linear"),
        (a_vector, "single vector"),
        (trained, "the weight trains"),
        (gradientless, "without gradients"),
    ],
)
def test_near_misses_say_why(build: Callable[[Small, fx.Node], fx.Node], reason: str) -> None:
    small = Small()
    rewrite = small.rewrite(build(small, small.input("x", 2, 3, 8)))
    assert after(rewrite, find_sites) == 0
    (skip,) = rewrite.skips
    assert skip.weight.name == "w" and reason in skip.reason
    assert OPS.site.default not in {n.target for n in rewrite.graph.nodes}


def test_a_weight_that_is_marked_for_its_padding_alone() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    rewrite = small.rewrite(small.site(x, "w", 16, spec=DENSE))
    assert after(rewrite, find_sites) == 0
    assert [site.weight.name for site in rewrite.dense] == ["w"] and not rewrite.skips


def test_a_weight_that_is_computed_is_none() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    w = small.call("mul", small.input("v", 16, 8), 2.0)
    factors = (small.input("a", 16, 2), small.input("b", 2, 8))
    rewrite = small.rewrite(small.linear(small.call(OPS.site.default, x, w, *factors, [], HALF), w))
    assert keeps_values(rewrite, find_sites) == 0
    assert not rewrite.skips and "site" not in text(rewrite)


def test_another_frozen_weight_is_no_branch() -> None:
    """What is added reads a frozen weight: it is a branch of the model, not of an adapter."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    other = small.input("other", 2, 8)
    side = small.linear(small.linear(x, other), small.input("B", 16, 2, trains=True))
    rewrite = small.rewrite(small.call(torch.add, small.site(x, "w", 16), side))
    rewrite.frozen = frozenset({other})
    after(rewrite, find_sites)
    assert not rewrite.sites[0].adapter_adds
