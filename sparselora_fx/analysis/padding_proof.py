"""Whether padding is read: proven on a graph and its bodies, before any pass changes them.

See docs/decisions/0008.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from sparselora_fx.analysis.attention_masks import hides_padding, key_axis
from sparselora_fx.analysis.losses import ignores_unlabelled, labels_of
from sparselora_fx.analysis.mask_values import MaskValues
from sparselora_fx.analysis.score_spans import ScoreSpans
from sparselora_fx.analysis.token_liveness import DEAD, Lists, LiveRows, Rows, common, read_rows
from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.layout import same_count, same_shape
from sparselora_fx.graph.nodes import argument, op_name, tensor
from sparselora_fx.ir.markers import MarkedTokens

_REAL: Lists = ("real tokens",)


def padding_unread(
    gm: fx.GraphModule, inputs: Sequence[object], arguments: Mapping[str, Tensor], shift: bool
) -> frozenset[fx.Node]:
    """The nodes of a graph and its bodies, ``[B, L, N]`` or ``[B * L, N]``, of which no row of
    padding reaches a loss.

    From the graph's end backwards, each reader works token by token, or is one where padding stops:
    a cross entropy on the batch's labels, or an attention that the batch's mask keeps from it. Of
    rows of tokens that are returned beside a loss (logits, hidden states) the caller is believed to
    look at real ones alone. A graph that ends before it has seen the loss (a block compiled by
    itself, a part before a graph break, a model whose loss is computed elsewhere) proves nothing.

    Lattice:    that of `token_liveness.read_rows`, with the list of real tokens.
    Direction:  backward, over a graph and its bodies.
    Rule:       that of `read_rows`; a body that is called several times must prove it each time.
    Sound:      padding stops at a loss whose labels ignore it and at an attention whose mask,
                computed for several paddings, gives it no weight (`score_spans`). What is believed
                of the caller is said above; docs/decisions/0008 says why.

    Args:
        gm: as it was traced, with site markers.
        inputs: what it was traced with.
        arguments: the tensors of the model's call, by name: inputs are known by identity, as a
            model may give another tensor the name.
        shift: as in `rewrite.Options`.
    """
    real = _real(gm)
    if real is None:
        return frozenset()
    proof = _Proof(gm, inputs, real, arguments, shift)
    proof.read(gm, None)
    return frozenset(node for node, unread in proof.unread.items() if unread)


def _real(gm: fx.GraphModule) -> fx.Node | None:
    """The input that says of each token of the batch ``[B, L]`` where it is among those that are no
    padding, if some site of a graph or its bodies can tell."""
    for node in gm.graph.nodes:
        if op_name(node) == "site":
            carried: MarkedTokens[fx.Node] = MarkedTokens.decode(node.args[4])
            if carried.real is not None:
                return carried.real.pos
    for _, body, operands in bodies(gm):
        inner = _real(body)
        if inner is not None:
            given = zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
            return dict(given).get(inner)
    return None


class _Proof:
    """``unread``: of each node read so far, whether its rows of padding reach no loss, whichever
    call of its body is meant."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[object],
        real: fx.Node,
        arguments: Mapping[str, Tensor],
        shift: bool,
    ) -> None:
        grid = tensor(real)
        assert grid is not None
        self.grid = grid.shape
        self.unread: dict[fx.Node, bool] = {}
        given = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        labels = {node for node, value in given if value is arguments.get("labels")}
        self.losses = {node for node in gm.graph.nodes if _is_loss(node, labels, shift)}
        self.believed = bool(self.losses) and not _is_broken_off(gm)
        self.spans = ScoreSpans(MaskValues(gm, inputs, arguments))

    def read(
        self, gm: fx.GraphModule, returned: Sequence[LiveRows | None] | None
    ) -> list[LiveRows | None]:
        """What a graph needs of its inputs. ``returned``: what is needed of its outputs, if it is a
        body."""
        calls = {call: (body, operands) for call, body, operands in bodies(gm)}
        inner: dict[fx.Node, list[LiveRows | None]] = {}

        def end(user: fx.Node, node: fx.Node, rows: Rows) -> LiveRows | None:
            if user in calls:
                body, operands = calls[user]
                if user not in inner:
                    inner[user] = self._read_body(user, body, operands, rows)
                given = zip(operands, inner[user], strict=True)
                return common(need for operand, need in given if operand is node)
            if user.op == "output":
                return self._returned(user, node, returned)
            return self._end(user, node, rows)

        rows = read_rows(gm.graph, end)
        for node in gm.graph.nodes:
            example = tensor(node)
            if example is not None and example.dim() in (2, 3):
                unread = rows.get(node) in (DEAD, LiveRows(0, example.dim() - 2, _REAL))
                self.unread[node] = self.unread.get(node, True) and unread
        return [rows.get(node) for node in gm.graph.find_nodes(op="placeholder")]

    def _read_body(
        self,
        call: fx.Node,
        body: fx.GraphModule,
        operands: list[object],
        rows: Rows,
    ) -> list[LiveRows | None]:
        self.spans.enter(body, operands)
        output = body.graph.output_node().args[0]
        returned: list[LiveRows | None] = [rows.get(call)]
        if isinstance(output, tuple | list):
            picks = [[u for u in call.users if u.args[1:] == (i,)] for i in range(len(output))]
            whole = any(op_name(user) != "getitem" for user in call.users)
            returned = [None if whole else common(map(rows.get, users)) for users in picks]
        return self.read(body, returned)

    def _returned(
        self, output: fx.Node, node: fx.Node, returned: Sequence[LiveRows | None] | None
    ) -> LiveRows | None:
        """What is needed of a node that a graph returns; None: all."""
        if returned is not None:
            values: object = output.args[0]
            values = values if isinstance(values, tuple | list) else (values,)
            return common(n for v, n in zip(values, returned, strict=True) if v is node)
        example = tensor(node)
        if example is None or not self.believed:
            return None
        # Of rows of tokens, a caller looks at real ones; anything else may be a loss of its own.
        if example.dim() == 3 and same_shape(example.shape[:2], self.grid):
            return LiveRows(0, 1, _REAL)
        if example.dim() == 2 and same_count(example.shape[:1], self.grid):
            return LiveRows(0, 0, _REAL)
        return None

    def _end(self, user: fx.Node, node: fx.Node, rows: Rows) -> LiveRows | None:
        example = tensor(node)
        if example is None:
            return None
        if user in self.losses and argument(user, 0, "input") is node:
            return LiveRows(0, 0, _REAL) if example.dim() == 2 else None
        # A row of padding may attend to padding: its own result must be unread, too.
        out = tensor(user)
        need = rows.get(user, DEAD)
        alone = out is not None and need.axis == out.dim() - 2 and need.batch == 0 < need.axis
        if alone and hides_padding(user, node, self.spans):
            return LiveRows(need.batch, key_axis(user, node, self.spans), _REAL)
        return None


def _is_loss(node: fx.Node, labels: set[fx.Node], shift: bool) -> bool:
    """Whether a node is a cross entropy on the call's labels, in which padding has no part."""
    found = labels_of(argument(node, 1, "target")) if ignores_unlabelled(node) else None
    return found is not None and found[1] == shift and found[0] in labels


def _is_broken_off(gm: fx.GraphModule) -> bool:
    """Whether a graph ends in a graph break: what follows may read all that it returns."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is None or bool(reason.graph_break)
