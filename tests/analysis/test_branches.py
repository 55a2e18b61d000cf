"""A LoRA branch is told by its leaves, whatever stands between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.branches import adapter_branch, reads
from tests.support.small_graphs import Small

Build = Callable[[Small, fx.Node], fx.Node]
BRANCHES: dict[str, Build] = {
    "plain": lambda s, x: s.lora(x, "w", 16),
    "scaled, with dropout": lambda s, x: s.call(
        torch.mul, s.lora(s.call(F.dropout, x, 0.1), "w", 16), 2.0
    ),
    "matmul": lambda s, x: s.call(
        torch.matmul, x, s.call("t", s.input("A", 16, 8, trains=True))
    ),
    "with a gain that trains": lambda s, x: s.call(
        torch.mul, s.lora(x, "w", 16), s.input("gain", 16, trains=True)
    ),
}  # fmt: skip
NONE: dict[str, Build] = {
    "x itself": lambda s, x: x,
    "without weights": lambda s, x: s.call(torch.mul, x, 2.0),
    "of a frozen weight": lambda s, x: s.linear(x, s.input("w", 16, 8)),
    "of another value": lambda s, x: s.lora(s.input("y", 2, 3, 8), "w", 16),
    "a vector alone trains": lambda s, x: s.call(torch.mul, x, s.input("g", 8, trains=True)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches(name: str) -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    end = BRANCHES[name](small, x)
    branch = adapter_branch(end, x)
    assert branch is not None and end in branch and x not in branch
    assert branch == {n for n in small.graph.nodes if n.op != "placeholder"}


@pytest.mark.parametrize("name", NONE)
def test_near_misses(name: str) -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    assert adapter_branch(NONE[name](small, x), x) is None


def test_a_branch_may_read_what_its_linear_s_input_was_before_views() -> None:
    """A Conv1D flattens its input, its adapter does not."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    flat = small.call("view", x, -1, 8)
    assert adapter_branch(small.lora(x, "w", 16), flat) is not None
    assert adapter_branch(small.lora(small.call("neg", x), "v", 16), flat) is not None
    other = small.input("z", 2, 3, 8)
    assert adapter_branch(small.lora(x, "u", 16), other) is None


def test_a_branch_is_a_handful_of_nodes() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    end = small.lora(x, "w", 8)
    for _ in range(64):
        end = small.call("neg", end)
    assert adapter_branch(end, x) is None


def test_what_a_branch_reads() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    end = small.lora(x, "w", 16)
    branch = adapter_branch(end, x)
    assert branch is not None
    assert reads(branch, {x}) and reads(branch, {end})
    assert not reads(branch, {small.input("other", 2)})
