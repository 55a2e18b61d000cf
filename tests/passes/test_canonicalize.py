"""Equal spellings come to one form, bit for bit where no linear is sparse."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.passes.canonicalize import canonicalize
from tests.support.small_graphs import (
    F64,
    Small,
    after,
    changes_nothing,
    keeps_values,
    shown,
    text,
)


def test_arguments_by_name_needless_casts_and_dropout_that_is_off() -> None:
    small = Small()
    x, w = small.input("x", 2, 3, 4), small.input("w", 5, 4)
    y = small.call(F.linear, input=x, weight=w)
    z = small.call("to", y, F64)
    u = small.call(F.dropout, z, 0.0)
    rewrite = small.rewrite(small.call(F.silu, u))
    assert keeps_values(rewrite, canonicalize) == 3
    assert text(rewrite) == shown("""
        v0 = linear(x, weight=w)
        v1 = silu(v0)
        return (v1)
    """)
    changes_nothing(rewrite, canonicalize)


@pytest.mark.parametrize(
    "near_miss",
    [
        lambda s, x: s.call("to", x, torch.float32),
        lambda s, x: s.call("to", x, F64, copy=True),
        lambda s, x: s.call("to", x, "cpu", F64, False, True),
        lambda s, x: s.call(F.dropout, x, 0.1),
        lambda s, x: s.call("contiguous", s.call("transpose", x, 0, 1)),
        lambda s, x: s.call(torch.where, s.call(torch.gt, x, 0.0), input=x, other=0.0),
    ],
    ids=["other dtype", "copy", "copy by position", "dropout", "made contiguous", "where"],
)
def test_what_changes_a_value_stays(near_miss: Callable[[Small, fx.Node], fx.Node]) -> None:
    small = Small()
    rewrite = small.rewrite(near_miss(small, small.input("x", 2, 3, 4)))
    changes_nothing(rewrite, canonicalize)


def beside_a_sparse_linear(sparse: bool) -> tuple[Small, fx.Node]:
    """A graph with a value to spell, and a marked linear if it is to be sparse."""
    small = Small()
    x = small.input("x", 2, 3, 4)
    return small, small.site(x, "w", 4) if sparse else small.linear(x, small.input("w", 4, 4))


def filled(small: Small, y: fx.Node) -> fx.Node:
    buffer = small.call("new_empty", y, (2, 3, 8))
    small.call(operator.setitem, buffer, (Ellipsis, slice(None, 4)), y)
    small.call(operator.setitem, buffer, (Ellipsis, slice(4, None)), small.call("neg", y))
    return small.call(F.silu, buffer)


def interleaved(small: Small, y: fx.Node) -> fx.Node:
    buffer = small.call("new_empty", y, (2, 3, 8))
    for start in (0, 1):
        part = small.call(operator.getitem, buffer, (Ellipsis, slice(start, None, 2)))
        small.call("copy_", part, y)
    return small.call(F.silu, buffer)


def turned(small: Small, y: fx.Node) -> fx.Node:
    there = small.call(F.silu, small.call("transpose", y, 1, 2))
    return small.call("transpose", there, 1, 2)


SPELLINGS = {
    filled: """
        v0 = linear(x, w, None)
        v1 = neg(v0)
        v2 = cat((v0, v1), dim=-1)
        v3 = silu(v2)
        return (v3)
    """,
    interleaved: """
        v0 = linear(x, w, None)
        v1 = stack((v0, v0), -1)
        v2 = flatten(v1, -2)
        v3 = silu(v2)
        return (v3)
    """,
    turned: """
        v0 = linear(x, w, None)
        v1 = silu(v0)
        return (v1)
    """,
}


@pytest.mark.parametrize(("spell", "expected"), SPELLINGS.items())
def test_spellings_beside_a_sparse_linear(
    spell: Callable[[Small, fx.Node], fx.Node], expected: str
) -> None:
    small, y = beside_a_sparse_linear(sparse=True)
    rewrite = small.rewrite(spell(small, y))
    assert keeps_values(rewrite, canonicalize) > 0
    lines = text(rewrite).splitlines()[1:]  # behind the marker
    assert [line.split("= ")[-1].split("(")[0] for line in lines] == [
        line.split("= ")[-1].split("(")[0] for line in shown(expected).splitlines()
    ]
    changes_nothing(rewrite, canonicalize)


@pytest.mark.parametrize("spell", SPELLINGS)
def test_without_a_sparse_linear_they_stay(spell: Callable[[Small, fx.Node], fx.Node]) -> None:
    small, y = beside_a_sparse_linear(sparse=False)
    changes_nothing(small.rewrite(spell(small, y)), canonicalize)


def test_what_is_written_in_place_is_a_function_beside_a_sparse_linear() -> None:
    small, y = beside_a_sparse_linear(sparse=True)
    scaled = small.call(operator.imul, y, 2.0)
    rewrite = small.rewrite(small.call(F.silu, scaled))
    assert keeps_values(rewrite, canonicalize) == 1
    assert "imul" not in text(rewrite)
    changes_nothing(rewrite, canonicalize)


def partly_filled(small: Small, y: fx.Node) -> fx.Node:
    buffer = small.call("new_zeros", y, (2, 3, 8))
    buffer.target = "new_empty"  # zeros for the example's sake
    small.call(operator.setitem, buffer, (Ellipsis, slice(None, 4)), y)
    return small.call(F.silu, buffer)


def read_too_early(small: Small, y: fx.Node) -> fx.Node:
    buffer = small.call("new_empty", y, (2, 3, 8))
    small.call(operator.setitem, buffer, (Ellipsis, slice(None, 4)), y)
    read = small.call(F.silu, buffer)
    small.call(operator.setitem, buffer, (Ellipsis, slice(4, None)), y)
    return small.call(torch.add, read, buffer)


def cast_on_the_way(small: Small, y: fx.Node) -> fx.Node:
    buffer = small.call("new_empty", y, (2, 3, 8), dtype=torch.float32)
    for part in (slice(None, 4), slice(4, None)):
        small.call(operator.setitem, buffer, (Ellipsis, part), y)
    return small.call(F.silu, buffer)


@pytest.mark.parametrize("spell", [partly_filled, read_too_early, cast_on_the_way])
def test_buffers_that_are_no_concatenation_stay(
    spell: Callable[[Small, fx.Node], fx.Node],
) -> None:
    small, y = beside_a_sparse_linear(sparse=True)
    rewrite = small.rewrite(spell(small, y))
    after(rewrite, canonicalize)
    assert "cat(" not in text(rewrite) and "setitem" in text(rewrite)
