"""Each rule by which a token gather moves up, and what holds one back."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.hoist_token_gathers import hoist_token_gathers
from tests.support.gathered_graphs import GIVEN, Lists
from tests.support.small_graphs import (
    Small,
    changes_nothing,
    keeps_values,
    list_values,
    shown,
    text,
)

SCATTER, SCATTER_TWO = (
    getattr(OPS, name).default for name in ("scatter_tokens", "scatter_two_lists")
)
EVEN = torch.tensor([[True, True, False], [True, True, False]])
Build = Callable[[Small, fx.Node], fx.Node]


def test_the_example_of_the_docstring() -> None:
    small = Lists(outputs=2)
    y, z = small.input("y", 4, 8, trains=True), small.input("z", 2, 8, trains=True)
    whole = small.call(SCATTER_TWO, y, z, *small.c, *small.o)
    h = small.call(F.silu, small.call(torch.add, whole, small.input("b", 8, trains=True)))
    rewrite = small.rewrite(small.gather(h), small.gather(h, small.o))
    given = list_values("c", EVEN, 4) | list_values("o", ~EVEN, 2)
    assert keeps_values(rewrite, hoist_token_gathers, **given) == 6
    assert text(rewrite) == shown("""
        v0 = add(y, b)
        v1 = add(z, b)
        v2 = silu(v0)
        v3 = silu(v1)
        return (v2, v3)
    """)
    changes_nothing(rewrite, hoist_token_gathers)


RULES: dict[str, tuple[Build, str]] = {
    "pointwise": (
        lambda s, x: s.call(F.silu, x),
        "v0 = gather_tokens(x, c_idx, c_pos); v1 = silu(v0); return (v1)",
    ),
    "view": (
        lambda s, x: s.call("reshape", x, 6, 8),
        "v0 = gather_tokens(x, c_idx, c_pos); return (v0)",
    ),
    "half": (
        lambda s, x: s.call(operator.getitem, x, (Ellipsis, slice(4, None))),
        "v0 = gather_tokens(x, c_idx, c_pos); "
        "v1 = getitem(v0, (Ellipsis, slice(4, 8, 1))); return (v1)",
    ),
    "linear": (
        lambda s, x: s.linear(x, s.input("w", 12, 8), s.input("b", 12)),
        "v0 = gather_tokens(x, c_idx, c_pos); v1 = linear(v0, w, b); return (v1)",
    ),
    "linear that narrows": (
        lambda s, x: s.linear(x, s.input("w", 2, 8)),
        "v0 = gather_tokens(x, c_idx, c_pos); v1 = linear(v0, w, None); return (v1)",
    ),
    "mean": (
        lambda s, x: s.call("mean", x, -1, keepdim=True),
        "v0 = gather_tokens(x, c_idx, c_pos); v1 = mean(v0, keepdim=True, dim=-1); return (v1)",
    ),
    "norm": (
        lambda s, x: s.call(F.layer_norm, x, (8,)),
        "v0 = gather_tokens(x, c_idx, c_pos); v1 = layer_norm(v0, (8)); return (v1)",
    ),
    "round trip": (
        lambda s, x: s.call(SCATTER, s.gather(x), *s.c),  # type: ignore[attr-defined]
        "v0 = gather_tokens(x, c_idx, c_pos); return (v0)",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    small = Lists()
    build, expected = RULES[rule]
    rewrite = small.rewrite(small.gather(build(small, small.x)))
    assert keeps_values(rewrite, hoist_token_gathers, **GIVEN) == 1
    assert text(rewrite).splitlines() == expected.split("; ")
    changes_nothing(rewrite, hoist_token_gathers)


def test_a_value_for_each_token_is_taken_too() -> None:
    small = Lists()
    scaled = small.call(torch.mul, small.x, small.input("s", 2, 3, 1, trains=True))
    rewrite = small.rewrite(small.gather(scaled))
    assert keeps_values(rewrite, hoist_token_gathers, **GIVEN) == 1
    assert text(rewrite).count("gather_tokens") == 2
    changes_nothing(rewrite, hoist_token_gathers)


STAYS: dict[str, Build] = {
    "softmax over tokens": lambda s, x: s.call(F.softmax, x, dim=1),
    "cumulative": lambda s, x: s.call("cumsum", x, 1),
    "mean over tokens": lambda s, x: s.call("expand", s.call("mean", x, 1, keepdim=True), 2, 3, 8),
    "channels become tokens": lambda s, x: s.call("reshape", x, 2, 12, 2),
    "a factor for each place": lambda s, x: s.call(torch.mul, x, s.input("f", 1, 3, 8)),
    "all of a norm": lambda s, x: s.call(F.layer_norm, x, (3, 8)),
}


@pytest.mark.parametrize("name", STAYS)
def test_near_misses_stay(name: str) -> None:
    small = Lists()
    changes_nothing(small.rewrite(small.gather(STAYS[name](small, small.x))), hoist_token_gathers)


def test_two_lists_take_what_is_cheaper_to_take_after() -> None:
    """A projection that narrows is computed once, for both."""
    small = Lists()
    y = small.linear(small.x, small.input("w", 2, 8))
    changes_nothing(small.rewrite(small.gather(y), small.gather(y, small.o)), hoist_token_gathers)
