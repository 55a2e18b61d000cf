"""What a marker says of a weight, and in which linear the weight is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from sparselora_fx.analysis.regions import Site, Skip
from sparselora_fx.analysis.sites import site_of
from sparselora_fx.ir.markers import WITHOUT_GRADIENTS, SiteSpec
from tests.support.small_graphs import HALF, Small

Build = Callable[[Small, fx.Node, fx.Node], object]


def found(build: Build, *, spec: str = HALF, markers: int = 1, trains: bool = False) -> Site | Skip:
    """What is found of a weight ``[4, 8]`` that is used on ``x[2, 3, 8]``."""
    small = Small()
    x, w = small.input("x", 2, 3, 8), small.input("w", 4, 8, trains=trains)
    a, b = small.input("a", 4, 2), small.input("b", 2, 8)
    build(small, x, w)
    return site_of(w, (x, w, a, b, [], spec), markers)


def once(small: Small, x: fx.Node, w: fx.Node) -> fx.Node:
    return small.linear(x, w)


def twice(small: Small, x: fx.Node, w: fx.Node) -> fx.Node:
    dropped = small.call(torch.nn.functional.dropout, x, 0.1)
    return small.call(torch.add, small.linear(x, w), small.linear(dropped, w))


def test_a_linear() -> None:
    site = found(once)
    assert isinstance(site, Site)
    assert (site.out_features, site.in_features, site.transposed) == (4, 8, False)
    assert (site.x.name, site.spec, site.tokens.counted) == ("x", SiteSpec(0.5, 0.5), None)


def test_two_products_of_one_input_dropout_aside() -> None:
    site = found(twice)
    assert isinstance(site, Site)
    assert [x.name for x in site.more.values()] == ["dropout"]


def other_inputs(small: Small, x: fx.Node, w: fx.Node) -> fx.Node:
    return small.call(torch.add, small.linear(x, w), small.linear(small.call("neg", x), w))


def biased_twice(small: Small, x: fx.Node, w: fx.Node) -> fx.Node:
    bias = small.input("bias", 4)
    return small.call(torch.add, small.linear(x, w), small.linear(x, w, bias))


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (once, {"trains": True}, "the weight trains"),
        (once, {"spec": WITHOUT_GRADIENTS}, "without gradients"),
        (once, {"markers": 2}, "used more than once"),
        (other_inputs, {}, "used more than once"),
        (biased_twice, {}, "used more than once"),
        (lambda s, x, w: None, {}, "not used by a linear"),
        (lambda s, x, w: s.call("neg", w), {}, "neg with this weight is not a linear"),
        (lambda s, x, w: s.linear(s.call("select", s.call("select", x, 0, 0), 0, 0), w), {},
         "single vector"),
    ],
)  # fmt: skip
def test_reasons(build: Build, options: dict[str, object], reason: str) -> None:
    skip = found(build, **options)  # type: ignore[arg-type]
    assert isinstance(skip, Skip) and skip.weight.name == "w"
    assert reason in skip.reason
