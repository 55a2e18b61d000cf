"""Every spelling of a linear, and which way round it takes its weight."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.linears import linear_parts, linear_uses, products, stored_kn
from tests.support.small_graphs import Small

Build = Callable[[Small, fx.Node, fx.Node, fx.Node], fx.Node]
NK: dict[str, Build] = {
    "linear": lambda s, x, w, b: s.call(F.linear, x, w, b),
    "by name": lambda s, x, w, b: s.call(F.linear, input=x, weight=w, bias=b),
    "einsum": lambda s, x, w, b: s.call(torch.einsum, "ti,oi->to", x, w),
    "einsum, weight first": lambda s, x, w, b: s.call(torch.einsum, "oi,ti->to", w, x),
    "einsum, a list": lambda s, x, w, b: s.call(torch.einsum, "...i,oi->...o", [x, w]),
}
KN: dict[str, Build] = {
    "matmul": lambda s, x, w, b: s.call(torch.matmul, x, w),
    "mm": lambda s, x, w, b: s.call(torch.mm, x, w),
    "by other": lambda s, x, w, b: s.call(torch.matmul, input=x, other=w),
    "addmm": lambda s, x, w, b: s.call(torch.addmm, b, x, w),
    "einsum": lambda s, x, w, b: s.call(torch.einsum, "ti,io->to", x, w),
}


def built(build: Build, *, kn: bool) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    small = Small()
    x, b = small.input("x", 5, 3), small.input("b", 4)
    w = small.input("w", *((3, 4) if kn else (4, 3)))
    return x, w, b, build(small, x, w, b)


@pytest.mark.parametrize("name", NK)
def test_spellings_that_take_nk(name: str) -> None:
    x, w, b, y = built(NK[name], kn=False)
    bias = b if "einsum" not in name else None
    assert linear_parts(y, w) == (x, bias, False)


@pytest.mark.parametrize("name", KN)
def test_spellings_that_take_kn(name: str) -> None:
    x, w, b, y = built(KN[name], kn=True)
    assert linear_parts(y, w) == (x, b if name == "addmm" else None, True)


NONE: dict[str, Build] = {
    "scaled": lambda s, x, w, b: s.call(torch.addmm, b, x, w, alpha=2),
    "the weight on the left": lambda s, x, w, b: s.call(torch.matmul, s.call("t", w), w),
    "another weight": lambda s, x, w, b: s.call(torch.matmul, x, s.call("neg", w)),
    "summed over tokens": lambda s, x, w, b: s.call(torch.einsum, "ti,io->o", x, w),
    "a bias for each place": lambda s, x, w, b: s.call(
        torch.addmm, s.input("full", 5, 4), x, w
    ),
    "implicit einsum": lambda s, x, w, b: s.call(torch.einsum, "ti,io", x, w),
    "pointwise": lambda s, x, w, b: s.call("neg", w),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_linear(name: str) -> None:
    _, w, _, y = built(NONE[name], kn=True)
    first = w if name != "the weight on the left" else y.args[0]
    assert isinstance(first, fx.Node) and linear_parts(y, first) is None


def test_uses_are_found_through_views_and_casts() -> None:
    small = Small()
    x, w = small.input("x", 5, 3), small.input("w", 4, 3)
    turned = small.call("t", small.call("to", w, torch.float64, copy=True))
    y = small.call(torch.matmul, x, turned)
    z = small.call(torch.matmul, x, small.call(getattr, w, "T"))
    assert linear_uses(w) == [(y, turned, True), (z, z.args[1], True)]
    assert stored_kn(w) is None  # nothing reads them
    small.graph.output((y, z))
    assert stored_kn(w) is False


def test_a_weight_stored_the_other_way_round() -> None:
    _, w, _, y = built(KN["matmul"], kn=True)
    y.graph.output(y)
    assert stored_kn(w) is True


def with_norms(reduce: bool) -> fx.Node:
    """A linear, and what DoRA makes of its weight: a norm for each row, or something else."""
    small = Small()
    x, w = small.input("x", 5, 3), small.input("w", 4, 3)
    y = small.linear(x, w)
    moved = small.call(torch.add, w, small.input("delta", 4, 3))
    norms = small.call(torch.linalg.norm, moved, dim=1) if reduce else small.call("neg", moved)
    small.graph.output((y, norms))
    return w


def test_norms_of_rows_are_no_products() -> None:
    assert [node.name for node, *_ in products(with_norms(True))] == ["linear"]
    assert len(products(with_norms(False))) == 2


def test_a_row_that_is_picked_is_another_use() -> None:
    small = Small()
    x, w = small.input("x", 5, 3), small.input("w", 4, 3)
    small.linear(x, w)
    small.call(operator.getitem, w, 0)
    assert len(products(w)) == 2
