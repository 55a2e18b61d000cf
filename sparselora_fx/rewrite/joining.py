"""Linears that read one input as a single matmul."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import fx

from sparselora_fx.graph.nodes import argument, has_side_effect, op_name, tensor
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.ir.ops import LIBRARY
from sparselora_fx.rewrite.respell import drop


def join_alike(graph: fx.Graph, wanted: Callable[[fx.Node], bool]) -> int:
    """Join those of the wanted linears that read the same input, with nothing between them that may
    write to it. Returns the linears joined.

    The wanted ones have no bias, and weights that are there before the first of them. Weights of
    several dtypes are not joined.
    """
    groups = alike(graph, wanted, lambda node: _source(argument(node, 0, "input")))
    for group in groups:
        _join(graph, group)
    return sum(map(len, groups))


def alike(
    graph: fx.Graph, wanted: Callable[[fx.Node], bool], key: Callable[[fx.Node], Hashable]
) -> list[list[fx.Node]]:
    """The wanted linears of one key and one dtype of weights, with nothing between them that may
    write to what they read; those that are several."""
    groups: dict[Hashable, list[fx.Node]] = {}
    written = 0
    for node in graph.nodes:
        written += _may_write(node)
        weight = tensor(argument(node, 1, "weight")) if wanted(node) else None
        if weight is not None:
            groups.setdefault((key(node), written, weight.dtype), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _may_write(node: fx.Node) -> bool:
    ours = getattr(node.target, "namespace", None) == LIBRARY.ns  # unread ones are choices
    return not ours and has_side_effect(node)


def _source(x: fx.Node) -> Hashable:
    """What tells one input from another: the node, or for a cast what it casts to what."""
    if op_name(x) in CASTS and isinstance(x.args[0], fx.Node):
        return (x.args[0], x.op, x.target, tuple(x.args[1:]), tuple(sorted(x.kwargs.items())))
    return x


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    weights = [argument(node, 1, "weight") for node in group]
    with graph.inserting_before(first):
        stacked = graph.call_function(torch.cat, (weights,))
        x = argument(first, 0, "input")
        joint = graph.call_function(torch.nn.functional.linear, (x, stacked))
        start = 0
        for node, weight in zip(group, weights, strict=True):
            width = int(weight.meta["example_value"].shape[0])
            part = graph.call_function(torch.narrow, (joint, -1, start, width))
            node.replace_all_uses_with(part)
            start += width
    for node in group:
        drop(node)  # and the cast that it alone read
