"""Attention that hides padding: fused with a mask, or written out with one."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.score_spans import ScoreSpans
from sparselora_fx.analysis.token_liveness import ATTENTION, MATMULS, factors
from sparselora_fx.graph.layout import same_count
from sparselora_fx.graph.nodes import argument, op_name, operand, reads_shape_only, tensor
from sparselora_fx.graph.op_families import CASTS, RESHAPES
from sparselora_fx.graph.pointwise import is_pointwise

_WEIGHING = ("softmax", "max", "amax", "logsumexp")
_KEEPS_ZEROS = CASTS | {"dropout"}


def hides_padding(attention: fx.Node, node: fx.Node, spans: ScoreSpans) -> bool:
    """Whether a call is part of an attention that reads a node as its keys or values, and gives
    those of padding no weight.

    Recognised are the fused attention with a mask, and the two products of
    ``softmax(f(q @ k^T)) @ v`` with an f that works place by place and puts a mask in.

    Rule:   forward from the scores, every reader keeps each column in its place until a softmax
            along the last dimension reads bounds that `ScoreSpans.hide`; backward from the weights,
            nothing but what keeps zeros (casts, dropout, reshapes of rows) since that softmax.
    Sound:  a weight of 0 times any finite row is 0, and so is its gradient. One reader of the
            scores that is not understood makes the answer no.
    """
    name = op_name(attention)
    if name == ATTENTION:
        mask = argument(attention, 3, "attn_mask")
        return node not in (mask, argument(attention, 0, "query")) and spans.hide_with(mask)
    if name not in MATMULS:
        return False
    first, second = factors(attention)
    if node is not second or node is first or not isinstance(first, fx.Node):
        return False
    return _are_hidden(attention, spans) or _are_weights(first, spans)


def key_axis(attention: fx.Node, node: fx.Node, spans: ScoreSpans) -> int:
    """The token axis of what `hides_padding` has found: the last of transposed keys, else the one
    before it."""
    example = tensor(node)
    assert example is not None
    written_out = op_name(attention) in MATMULS and _are_hidden(attention, spans)
    return example.dim() - (1 if written_out else 2)


def _are_hidden(scores: fx.Node, spans: ScoreSpans) -> bool:
    """Whether all that becomes of scores is probabilities, in which those of padding have no
    part."""
    readers = [user for user in scores.users if not reads_shape_only(user, scores)]
    return bool(readers) and all(
        spans.hide(scores)
        if _along_last(user, _WEIGHING)
        else _keeps_places(user, scores) and _are_hidden(user, spans)
        for user in readers
    )


def _are_weights(probabilities: fx.Node, spans: ScoreSpans) -> bool:
    """Whether a node holds probabilities, or what dropout leaves of them, of masked scores."""
    node = probabilities
    while op_name(node) in _KEEPS_ZEROS or _reshapes(node) or _drops_last(node):
        node = operand(node)
    return _along_last(node, ("softmax",)) and spans.hide(argument(node, 0, "input"))


def _keeps_places(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node leaves the places of scores as they are, or puts columns behind them (an
    attention's sinks)."""
    before, after = tensor(source), tensor(node)
    same = before is not None and after is not None and before.dim() == after.dim()
    pieces = node.args[0] if node.args else None
    if _along_last(node, ("cat", "concat")):
        return isinstance(pieces, tuple | list) and pieces[0] is source
    return _reshapes(node) or (same and (op_name(node) in CASTS or is_pointwise(node)))


def _drops_last(node: fx.Node) -> bool:
    """Whether a node is ``x[..., :n]``."""
    key = node.args[1] if op_name(node) == "getitem" else None
    if not isinstance(key, tuple) or not all(isinstance(k, slice) or k is Ellipsis for k in key):
        return False
    whole = all(k is Ellipsis or k == slice(None) for k in key[:-1])
    return whole and isinstance(key[-1], slice) and not key[-1].start and key[-1].step in (None, 1)


def _reshapes(node: fx.Node) -> bool:
    """Whether a node groups the rows of scores otherwise: heads and samples as one dimension."""
    before, after = tensor(node.args[0]) if node.args else None, tensor(node)
    if op_name(node) not in RESHAPES or before is None or after is None:
        return False
    apart = min(before.dim(), after.dim()) < 2
    return not apart and bool(same_count(before.shape[-1:], after.shape[-1:]))


def _along_last(node: object, names: tuple[str, ...]) -> bool:
    """Whether a node is one of some operations, along the last dimension of its input."""
    if not isinstance(node, fx.Node) or op_name(node) not in names or not node.args:
        return False
    first = node.args[0]
    example = tensor(first[0] if isinstance(first, tuple | list) else first)
    dim = argument(node, 1, "dim")
    if example is None or not isinstance(dim, int):
        return False
    return dim % example.dim() == example.dim() - 1
