"""Replay a region's own function on low-rank approximations, to score its channels.

The score of a channel is its column norm over pooled tokens (paper section 3; shapes: B samples, N
channels): FFN ``||f(W~1 x, W~2 x, ...)||``, queries and keys ``||W~q x|| * ||W~k x||``, values
``||W~v x||``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparselora_fx.analysis.channel_values import Channels, Values, completes_site
from sparselora_fx.analysis.regions import Site
from sparselora_fx.analysis.scorable import SEEN_THROUGH
from sparselora_fx.graph.emit import copied
from sparselora_fx.graph.layout import channel_map
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.respell import columns, rrelu_slope


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
        if op_name(node) in SEEN_THROUGH or completes_site(node, value):
            return self.build(next(n for n in node.all_input_nodes if n in self.values))
        operands = {source: self._operand(source) for source in node.all_input_nodes}
        if op_name(node) == "rrelu":  # as in evaluation: a score draws no random numbers
            (x,) = operands.values()
            leaky = torch.nn.functional.leaky_relu
            return self.graph.call_function(leaky, (x, rrelu_slope(node)))
        return copied(node, operands.__getitem__)

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
            return columns(approximation, rows)
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
