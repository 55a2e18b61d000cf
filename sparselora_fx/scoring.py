"""Replay a region's own function on low-rank approximations, to score its channels.

The score of a channel is its column norm over pooled tokens (paper section 3; shapes: B samples, N
channels): FFN ``||f(W~1 x, W~2 x, ...)||``, queries and keys ``||W~q x|| * ||W~k x||``, values
``||W~v x||``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import is_pointwise, op_name, tensor
from sparselora_fx.layout import channel_map
from sparselora_fx.ops import OPS
from sparselora_fx.regions import Site
from sparselora_fx.spellings import rrelu_slope
from sparselora_fx.values import CASTS, NORMS, RESHAPES, Channels, Values, completes_site

_SEEN_THROUGH = CASTS | RESHAPES | {"dropout"}
_REPLAYED = NORMS | {"mean", "sum", "var", "std", "normalize", "rrelu"}


def can_score(node: fx.Node, values: Values, known: dict[fx.Node, bool]) -> bool:
    """Whether `Replay` can rebuild a node from its producers' approximations.

    ``known`` keeps the answers, as consumers all along a residual stream ask about the same nodes.
    """
    if node not in known:
        known[node] = _can_score(node, values, known)
    return known[node]


def _can_score(node: fx.Node, values: Values, known: dict[fx.Node, bool]) -> bool:
    value = values.get(node)
    if not isinstance(value, Channels):
        return False
    if value.moved:
        return value.ports[0].layout is not None and channel_map(value.ports[0].layout) is not None
    held = [source for source in node.all_input_nodes if source in values]
    if completes_site(node, value):
        return can_score(held[0], values, known)
    name = op_name(node)
    if not (name in _SEEN_THROUGH or name in _REPLAYED or is_pointwise(node)):
        return False
    others = [source for source in node.all_input_nodes if source not in values]
    return all(can_score(source, values, known) for source in held) and not any(
        map(_is_full_width, others)
    )


def _is_full_width(node: fx.Node) -> bool:
    """Whether a side input has a value for every token and every channel: not a function of the
    producers."""
    example = tensor(node)
    if example is None or example.dim() < 2:
        return False
    return example.shape[-1] != 1 and any(size != 1 for size in example.shape[:-1])


def side_inputs(node: fx.Node, values: Values) -> set[fx.Node]:
    """Nodes that a replay reads besides the producers: scales, biases, norm weights."""
    value = values[node]
    assert isinstance(value, Channels)
    if value.moved:
        return set()
    held = [source for source in node.all_input_nodes if source in values]
    if completes_site(node, value):
        return side_inputs(held[0], values)
    own = {source for source in node.all_input_nodes if source not in values}
    return own.union(*(side_inputs(source, values) for source in held))


class Replay:
    """Builds the score subgraph of one region: the region's function applied to approximations
    ``[rows, N]``. ``reduce`` brings any other tensor of tokens to the same rows."""

    def __init__(
        self,
        graph: fx.Graph,
        values: Values,
        approximate: Callable[[Site], fx.Node],
        reduce: Callable[[fx.Node], fx.Node],
    ) -> None:
        self.graph = graph
        self.values = values
        self.approximate = approximate
        self.reduce = reduce
        self.done: dict[fx.Node, fx.Node] = {}

    def build(self, node: fx.Node) -> fx.Node:
        """The ``[rows, N]`` approximation of a node that holds producers' channels."""
        if node not in self.done:
            self.done[node] = self._build(node)
        return self.done[node]

    def _build(self, node: fx.Node) -> fx.Node:
        value = self.values[node]
        assert isinstance(value, Channels)
        if value.moved:
            return self._port(value)
        if op_name(node) in _SEEN_THROUGH or completes_site(node, value):
            return self.build(next(n for n in node.all_input_nodes if n in self.values))
        operands = {source: self._operand(source) for source in node.all_input_nodes}
        if op_name(node) == "rrelu":  # as in evaluation: a score draws no random numbers
            (x,) = operands.values()
            leaky = torch.nn.functional.leaky_relu
            return self.graph.call_function(leaky, (x, rrelu_slope(node)))
        return self.graph.node_copy(node, lambda source: operands[source])

    def _port(self, value: Channels) -> fx.Node:
        port = value.ports[0]
        assert isinstance(port.source, Site) and port.layout is not None
        mapped = channel_map(port.layout)
        assert mapped is not None
        channels, (inner, outer_stride, offset) = mapped
        approximation = self.approximate(port.source)
        if channels == port.source.out_features and mapped[1] == (1, 1, 0):
            return approximation
        if inner == 1:
            rows = slice(offset, offset + outer_stride * (channels - 1) + 1, outer_stride)
            key: Any = (Ellipsis, rows)
            return self.graph.call_function(operator.getitem, (approximation, key))
        every = self.graph.call_function(torch.arange, (channels,))
        index = self.graph.call_function(
            OPS.channel_rows.default, (every, inner, outer_stride, [offset])
        )
        return self.graph.call_function(OPS.gather_channels.default, (approximation, index))

    def _operand(self, node: fx.Node) -> fx.Node:
        if node in self.values:
            return self.build(node)
        example = tensor(node)
        if example is None:
            return node
        leading = example.shape[:-1]
        if leading and not all(isinstance(size, int) and size == 1 for size in leading):
            return self.reduce(node)
        detached = self.graph.call_method("detach", (node,))
        if example.dim() <= 1:
            return detached
        return self.graph.call_method("reshape", (detached, (example.shape[-1],)))
