"""What masks hold, for batches with padding wherever it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparselora_fx.analysis.mask_values import MaskValues, is_weight
from tests.support.small_graphs import Small

MASK = torch.ones(2, 5, dtype=torch.int64)
Build = Callable[[Small, fx.Node, fx.Node], fx.Node]


def masks(build: Build) -> tuple[MaskValues, fx.Node]:
    """The values of what is built of a mask ``[2, 5]`` and of an embedding ``[2, 5, 8]``."""
    small = Small()
    mask = small.input("mask", 2, 5, dtype=torch.int64)
    x = small.input("x", 2, 5, 8)
    end = build(small, mask, x)
    small.graph.output((end,))
    tensors = {"mask": MASK, "x": torch.randn(2, 5, 8)}
    inputs: list[Any] = []
    for node in small.graph.find_nodes(op="placeholder"):
        known, shape = tensors.get(node.name), node.meta["example_value"].shape
        inputs.append(torch.arange(5.0).expand(shape) if known is None else known)
    arguments = {"attention_mask": tensors["mask"], "inputs_embeds": tensors["x"]}
    return MaskValues(small.gm, inputs, arguments), end


def additive(small: Small, mask: fx.Node, x: fx.Node) -> fx.Node:
    shown = small.call("to", small.call("view", mask, 2, 1, 1, 5), torch.bool)
    return small.call(torch.where, shown, 0.0, -1e9)


def test_a_mask_is_computed_for_every_padding() -> None:
    found, end = masks(additive)
    assert found.is_known(end)
    values = found.values(end)
    assert len(values) == len(found.batches) == 4
    for value, batch in zip(values, found.batches, strict=True):
        assert torch.equal(value, torch.where(batch.shown[:, None, None], 0.0, -1e9))


def test_paddings_are_on_each_side_on_both_and_inside() -> None:
    found, _ = masks(additive)
    right, left, both, inside = (batch.shown for batch in found.batches)
    assert right[:, 0].all() and not right[:, -1].any()
    assert left[:, -1].all() and not left[:, 0].any()
    assert not both[:, 0].any() and not both[:, -1].any()
    for shown in (right, left, both, inside):
        assert shown.any(dim=1).all() and not shown.all(dim=1).any()
        assert shown.dtype == torch.bool
    gaps = [row.int().diff().abs().sum() for row in inside]
    assert max(map(int, gaps)) > 1


KNOWN: dict[str, Build] = {
    "causal": lambda s, m, x: s.call("tril", s.call(torch.ones, 5, 5)),
    "a bias that is a buffer": lambda s, m, x: s.call("neg", s.input("buffer", 5)),
    "of the mask": lambda s, m, x: s.call("cumsum", m, -1),
}
UNKNOWN: dict[str, Build] = {
    "of the activations": lambda s, m, x: s.call("neg", x),
    "of a weight": lambda s, m, x: s.call("neg", s.weight("w", 5, 5)),
    "of a layer": lambda s, m, x: s.call(F.softmax, s.call("to", m, torch.float32), dim=-1),
    "written in place": lambda s, m, x: s.call("neg", s.call("fill_", s.call("clone", m), 1)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    found, end = masks(KNOWN[name])
    assert found.is_known(end)
    assert all(isinstance(value, Tensor) for value in found.values(end))


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    found, end = masks(UNKNOWN[name])
    assert not found.is_known(end)


def test_without_a_mask_there_are_no_batches() -> None:
    small = Small()
    small.graph.output((small.input("x", 2, 5),))
    assert MaskValues(small.gm, [torch.zeros(2, 5)], {}).batches == []


def test_inside_a_body_inputs_are_what_it_is_called_with() -> None:
    small = Small()
    mask = small.input("mask", 2, 5, dtype=torch.int64)
    small.graph.output((mask,))
    inner = Small()
    end = inner.call("neg", inner.input("m", 2, 5, dtype=torch.int64))
    inner.graph.output((end,))
    found = MaskValues(small.gm, [MASK], {"attention_mask": MASK})
    found.enter(inner.gm, [mask])
    assert found.source(inner.graph.find_nodes(op="placeholder")[0]) is mask
    assert found.is_known(end)
    for value, batch in zip(found.values(end), found.batches, strict=True):
        assert torch.equal(value, -batch.shown.long())


def test_weights_are_parameters() -> None:
    small = Small()
    assert is_weight(small.weight("w", 2, 2)) and not is_weight(small.input("x", 2, 2))
