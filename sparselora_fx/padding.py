"""Whether padding is read: proven on a graph and its bodies, before any pass changes them.

See docs/decisions/0008.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import argument, bodies, op_name, tensor
from sparselora_fx.layout import same_count
from sparselora_fx.masks import Nodes, hides_padding, key_axis
from sparselora_fx.ops import MARKERS
from sparselora_fx.rows import ATTENTION, MATMULS, NOTHING, Lists, Needs, Rows, common, read_rows

_REAL: Lists = ("real tokens",)
# Inputs [B, L] that say other things than which tokens are padding.
_OTHERS = ("input_ids", "labels", "position", "token_type")
_LAYERS = (ATTENTION, *MATMULS, *MARKERS, "linear", "addmm", "baddbmm", "embedding", "softmax")
_PADDED = 9  # tensors that a site marker carries in a batch with padding (`tokens.Tokens`)


def padding_unread(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes of a graph and its bodies, ``[B, L, N]`` or ``[B * L, N]``, of which no row of
    padding reaches a loss.

    From the graph's end backwards, each reader works token by token, or is one where padding stops:
    a cross entropy on the batch's labels, or an attention whose mask is made from the batch's. What
    a graph with a loss returns beside it is for its caller to look at. A graph without one (a
    block compiled by itself, a part before a graph break) is believed to be followed by such
    readers: only what is seen to mix rows counts against it.
    """
    grid = _grid(gm)
    if grid is None:
        return frozenset()
    proof = _Proof(gm, grid)
    proof.read(gm, proof.masks(gm), None)
    return frozenset(node for node, unread in proof.unread.items() if unread)


def _grid(gm: fx.GraphModule) -> torch.Tensor | None:
    """The batch's ``[B, L]``, if some site of a graph or its bodies can tell padding."""
    for graph in _graphs(gm):
        for node in graph.graph.nodes:
            if op_name(node) == "site" and len(node.args[4]) == _PADDED:
                return tensor(node.args[4][0])
    return None


def _graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    yield gm
    for _, body, _ in bodies(gm):
        yield from _graphs(body)


class _Proof:
    """``unread``: of each node read so far, whether its rows of padding reach no loss, whichever
    call of its body is meant."""

    def __init__(self, gm: fx.GraphModule, grid: torch.Tensor) -> None:
        self.grid = grid
        self.unread: dict[fx.Node, bool] = {}
        inputs = gm.graph.find_nodes(op="placeholder")
        grids = _made_from(gm.graph, {node for node in inputs if self._is_grid(node)})
        self.losses = {node for node in gm.graph.nodes if _is_loss(node, grids)}

    def masks(self, gm: fx.GraphModule) -> Nodes:
        """The nodes of the outermost graph that may say which tokens are padding."""
        inputs = gm.graph.find_nodes(op="placeholder")
        seeds = {
            node
            for node in inputs
            if self._is_grid(node) and not any(word in str(node.target) for word in _OTHERS)
        }
        if not self.losses:  # a block may be given the mask that its model has made
            seeds |= {node for node in inputs if self._is_mask(node)}
        return _made_from(gm.graph, seeds)

    def read(
        self, gm: fx.GraphModule, masks: Nodes, returned: Sequence[Needs | None] | None
    ) -> list[Needs | None]:
        """What a graph needs of its inputs. ``returned``: what is needed of its outputs, if it is a
        body."""
        calls = {call: (body, operands) for call, body, operands in bodies(gm)}
        inner: dict[fx.Node, list[Needs | None]] = {}

        def end(user: fx.Node, node: fx.Node, rows: Rows) -> Needs | None:
            if user in calls:
                body, operands = calls[user]
                if user not in inner:
                    inner[user] = self._read_body(user, body, operands, masks, rows)
                given = zip(operands, inner[user], strict=True)
                return common(need for operand, need in given if operand is node)
            if user.op == "output":
                return self._returned(user, node, returned)
            return self._end(user, node, masks, rows)

        rows = read_rows(gm.graph, end)
        for node in gm.graph.nodes:
            example = tensor(node)
            if example is not None and example.dim() in (2, 3):
                unread = rows.get(node) in (NOTHING, (example.dim() - 2, _REAL))
                self.unread[node] = self.unread.get(node, True) and unread
        return [rows.get(node) for node in gm.graph.find_nodes(op="placeholder")]

    def _read_body(
        self,
        call: fx.Node,
        body: fx.GraphModule,
        operands: list[Any],
        masks: Nodes,
        rows: Rows,
    ) -> list[Needs | None]:
        inputs = body.graph.find_nodes(op="placeholder")
        seeds = {node for node, operand in zip(inputs, operands, strict=True) if operand in masks}
        output = body.graph.output_node().args[0]
        returned: list[Needs | None] = [rows.get(call)]
        if isinstance(output, tuple | list):
            picks = [[u for u in call.users if u.args[1:] == (i,)] for i in range(len(output))]
            whole = any(op_name(user) != "getitem" for user in call.users)
            returned = [None if whole else common(map(rows.get, users)) for users in picks]
        return self.read(body, _made_from(body.graph, seeds), returned)

    def _returned(
        self, output: fx.Node, node: fx.Node, returned: Sequence[Needs | None] | None
    ) -> Needs | None:
        """What is needed of a node that a graph returns; None: all."""
        if returned is not None:
            values: Any = output.args[0]
            values = values if isinstance(values, tuple | list) else (values,)
            return common(n for v, n in zip(values, returned, strict=True) if v is node)
        example = tensor(node)
        scalars = 0 if self.losses else 1  # something of one dimension may be a loss by itself
        return NOTHING if example is not None and example.dim() > scalars else None

    def _end(self, user: fx.Node, node: fx.Node, masks: Nodes, rows: Rows) -> Needs | None:
        example = tensor(node)
        if example is None:
            return None
        if user in self.losses and argument(user, 0, "input") is node:
            return (0, _REAL) if example.dim() == 2 else None
        # A row of padding may attend to padding: its own result must be unread, too.
        out = tensor(user)
        alone = out is not None and rows.get(user) == (out.dim() - 2, _REAL)
        if alone and hides_padding(user, node, masks):
            return (key_axis(user, node, masks), _REAL)
        return None

    def _is_grid(self, node: fx.Node) -> bool:
        """Whether a node holds whole numbers or booleans ``[B, L]``."""
        example = tensor(node)
        if example is None or example.dtype.is_floating_point or example.dtype.is_complex:
            return False
        return example.dim() == 2 and _agree(example.shape, self.grid.shape)

    def _is_mask(self, node: fx.Node) -> bool:
        """Whether a node may be a mask ``[B, 1, L, L]``."""
        example = tensor(node)
        if example is None or isinstance(example, torch.nn.Parameter):
            return False
        return example.dim() > 2 and _agree(example.shape[-1:], self.grid.shape[-1:])


def _is_loss(node: fx.Node, grids: Nodes) -> bool:
    """Whether a node is a cross entropy with targets that are made from labels ``[B, L]``."""
    return op_name(node) == "cross_entropy" and argument(node, 1, "target") in grids


def _made_from(graph: fx.Graph, seeds: Nodes) -> Nodes:
    """All nodes that are computed from some, and those, but for what layers make of them."""
    found = set(seeds)
    for node in graph.nodes:
        if op_name(node) not in _LAYERS and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _agree(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(same_count((a,), (b,)) for a, b in zip(left, right, strict=True))
