"""Whether a region's function can be replayed on approximations, and what that reads."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.analysis.scorable import can_score, side_inputs
from sparselora_fx.passes.find_sites import find_sites
from tests.support.small_graphs import Small, after

Build = Callable[[Small, fx.Node], fx.Node]
YES: dict[str, tuple[Build, set[str]]] = {
    "itself": (lambda s, y: y, set()),
    "half": (lambda s, y: s.call(operator.getitem, y, (Ellipsis, slice(6))), set()),
    "gated": (lambda s, y: s.call(torch.mul, s.call(F.silu, y), y), set()),
    "scaled": (lambda s, y: s.call(torch.mul, y, s.input("gain", 12)), {"gain"}),
    "for each token": (lambda s, y: s.call(torch.mul, y, s.input("g", 2, 3, 1)), {"g"}),
    "normed": (lambda s, y: s.call(F.layer_norm, y, (12,), s.input("weight", 12)), {"weight"}),
    "flattened": (lambda s, y: s.call("reshape", s.call(F.silu, y), 6, 12), set()),
    "with dropout": (lambda s, y: s.call(F.dropout, s.call(F.silu, y), 0.1), set()),
}
NO: dict[str, Build] = {
    "a value for each token and channel": lambda s, y: s.call(
        torch.add, y, s.input("residual", 2, 3, 12)
    ),
    "mixed": lambda s, y: s.call("cumsum", y, -1),
    "rows twice": lambda s, y: s.call("repeat", y, 1, 1, 2),
    "no channels": lambda s, y: s.input("other", 2, 3, 12),
}


def built(build: Build) -> tuple[fx.Node, dict[fx.Node, object]]:
    small = Small()
    end = build(small, small.site(small.input("x", 2, 3, 8), "w", 12))
    rewrite = small.rewrite(small.call("neg", end))
    after(rewrite, find_sites)
    return end, propagate(rewrite.graph, rewrite.sites)  # type: ignore[return-value]


@pytest.mark.parametrize("name", YES)
def test_functions_that_can_be_replayed(name: str) -> None:
    build, reads = YES[name]
    end, values = built(build)
    answers: dict[fx.Node, bool] = {}
    assert can_score(end, values, answers)  # type: ignore[arg-type]
    assert answers[end]
    assert {node.name for node in side_inputs(end, values)} == reads  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NO)
def test_what_cannot(name: str) -> None:
    end, values = built(NO[name])
    assert not can_score(end, values, {})  # type: ignore[arg-type]


def test_a_branch_is_not_read() -> None:
    """The score is the frozen part's: a replay of ``y + BAx`` is one of y."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    end = small.call(torch.add, small.site(x, "w", 12), small.lora(x, "w", 12))
    rewrite = small.rewrite(end)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    assert can_score(end, values, {})
    assert side_inputs(end, values) == set()
