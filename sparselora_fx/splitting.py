"""Context and output tokens of a tensor apart, and in place again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparselora_fx.fx import tensor, with_stand_in
from sparselora_fx.layout import same_count
from sparselora_fx.ops import OPS
from sparselora_fx.sinking import take_of

Split = tuple[Sequence[Any], Sequence[Any]]  # [idx, pos] of context tokens, and of output tokens


def taken(graph: fx.Graph, x: fx.Node, split: Split) -> list[fx.Node]:
    """The rows of x for context tokens, and those for output tokens."""
    channels = int(x.meta["example_value"].shape[-1])
    takes = [take_of(graph, x, tuple(part)) for part in split]
    return [with_stand_in(take, x, rank=2, channels=channels) for take in takes]


def merged(
    graph: fx.Graph, y: fx.Node, z: fx.Node, split: Split, *, like: fx.Node, sizes_of: fx.Node
) -> fx.Node:
    """Rows y of context tokens and z of output tokens in place again, in the shape of ``like``.
    Where token dimensions are not the batch's own, they are those of ``sizes_of``."""
    context, output = split
    whole = graph.call_function(OPS.merge_tokens.default, (y, z, *context, *output))
    shaped(whole, like)
    shape, grid = tensor(like), tensor(context[1])
    assert shape is not None and grid is not None
    if shape.dim() == 2:  # a linear on flattened tokens
        return shaped(graph.call_method("flatten", (whole, 0, -2)), like)
    if shape.dim() != 3 or not all(map(same_count, zip(shape.shape[:-1]), zip(grid.shape))):
        sizes = [graph.call_method("size", (sizes_of, i)) for i in range(shape.dim() - 1)]
        return shaped(graph.call_method("reshape", (whole, *sizes, shape.shape[-1])), like)
    return whole


def shaped(node: fx.Node, like: fx.Node) -> fx.Node:
    """Give a new node the example value of another."""
    node.meta["example_value"] = like.meta["example_value"]
    return node
