"""Attention that hides padding: fused with a mask, or written out with one."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparselora_fx.fx import (
    argument,
    is_pointwise,
    op_name,
    reads_shape_only,
    tensor,
)
from sparselora_fx.layout import same_count
from sparselora_fx.mask_values import MaskValues
from sparselora_fx.rows import ATTENTION, MATMULS, factors
from sparselora_fx.values import CASTS, RESHAPES

_MASKING = ("add", "__add__", "__radd__", "iadd", "where", "masked_fill")
_WEIGHING = ("softmax", "max", "amax", "logsumexp")
_SCALING = ("mul", "__mul__", "div", "truediv", "__truediv__")
_SHIFTING = ("sub", "__sub__")
_KEEPS_ZEROS = CASTS | {"dropout"}


def hides_padding(attention: fx.Node, node: fx.Node, masks: MaskValues) -> bool:
    """Whether a call is part of an attention that reads a node as its keys or values, and gives
    those of padding no weight.

    Recognised are the fused attention with a mask, and the two products of
    ``softmax(cast(f(q @ k^T) + mask)) @ v`` with a pointwise f.
    """
    name = op_name(attention)
    if name == ATTENTION:
        mask = argument(attention, 3, "attn_mask")
        return node not in (mask, argument(attention, 0, "query")) and masks.hides(mask)
    if name not in MATMULS:
        return False
    first, second = factors(attention)
    if node is not second or node is first or not isinstance(first, fx.Node):
        return False
    return _is_hidden(attention, masks) or _is_zero(first, masks)


def key_axis(attention: fx.Node, node: fx.Node, masks: MaskValues) -> int:
    """The token axis of what `hides_padding` has found: the last of transposed keys, else the one
    before it."""
    example = tensor(node)
    assert example is not None
    written_out = op_name(attention) in MATMULS and _is_hidden(attention, masks)
    return example.dim() - (1 if written_out else 2)


def _is_hidden(scores: fx.Node, masks: MaskValues) -> bool:
    """Whether all that becomes of scores is masked and made probabilities of."""
    readers = [user for user in scores.users if not reads_shape_only(user, scores)]
    return bool(readers) and all(
        _is_masked(user, scores, masks) or (_is_plain(user, scores) and _is_hidden(user, masks))
        for user in readers
    )


def _is_masked(node: fx.Node, scores: fx.Node, masks: MaskValues) -> bool:
    """Whether a node masks scores, and only a softmax reads it."""
    return _masks(node, masks, but=scores) and _is_weighed(node)


def _is_weighed(masked: fx.Node) -> bool:
    """Whether all that becomes of masked scores is probabilities, in which those have no part."""
    readers = [user for user in masked.users if not reads_shape_only(user, masked)]
    return bool(readers) and all(
        _along_last(user, _WEIGHING) or (_passes_on(user, masked) and _is_weighed(user))
        for user in readers
    )


def _is_zero(probabilities: fx.Node, masks: MaskValues) -> bool:
    """Whether a node holds probabilities, or what dropout leaves of them, of masked scores."""
    node: Any = probabilities
    while op_name(node) in _KEEPS_ZEROS or _reshapes(node) or _drops_last(node):
        node = node.args[0]
    if not _along_last(node, ("softmax",)):
        return False
    node = argument(node, 0, "input")
    while isinstance(node, fx.Node) and not any(
        _masks(node, masks, but=source) for source in node.all_input_nodes
    ):
        source = node.args[0] if node.args else None
        source = source[0] if isinstance(source, tuple | list) else source
        if not isinstance(source, fx.Node) or not _passes_on(node, source):
            return False
        node = source
    return isinstance(node, fx.Node)


def _passes_on(node: fx.Node, masked: fx.Node) -> bool:
    """Whether masked scores are masked still: in another dtype, times or less one number a row, or
    with more columns behind them (an attention's sinks)."""
    name, other = op_name(node), argument(node, 1, "other")
    if node.args and node.args[0] is masked:
        held = tensor(other)
        a_row = held is not None and held.dim() > 0 and held.shape[-1] == 1
        return name in CASTS or (name in _SHIFTING and a_row) or _scales(name, other)
    pieces = node.args[0] if node.args else None
    first = isinstance(pieces, tuple | list) and pieces[0] is masked
    return first and _along_last(node, ("cat", "concat"))


def _scales(name: str, other: Any) -> bool:
    """Whether scores are multiplied or divided by a number such as the root of a head's size."""
    if isinstance(other, int | float):
        return name in _SCALING and (other if "mul" in name else 1 / (other or 1e9)) >= 1e-2
    held = tensor(other)
    return name in _SCALING and "mul" not in name and held is not None and held.dim() == 0


def _drops_last(node: Any) -> bool:
    """Whether a node is ``x[..., :n]``."""
    key = node.args[1] if op_name(node) == "getitem" else None
    if not isinstance(key, tuple) or not all(isinstance(k, slice) or k is Ellipsis for k in key):
        return False
    whole = all(k is Ellipsis or k == slice(None) for k in key[:-1])
    return whole and isinstance(key[-1], slice) and not key[-1].start and key[-1].step in (None, 1)


def _masks(node: fx.Node, masks: MaskValues, *, but: fx.Node) -> bool:
    """Whether a node joins scores with a mask."""
    return op_name(node) in _MASKING and masks.hides(node, but)


def _is_plain(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node leaves the places of scores as they are."""
    before, after = tensor(source), tensor(node)
    same = before is not None and after is not None and before.dim() == after.dim()
    return _reshapes(node) or (same and (op_name(node) in CASTS or is_pointwise(node)))


def _reshapes(node: fx.Node) -> bool:
    """Whether a node groups the rows of scores otherwise: heads and samples as one dimension."""
    before, after = tensor(node.args[0]) if node.args else None, tensor(node)
    if op_name(node) not in RESHAPES or before is None or after is None:
        return False
    apart = min(before.dim(), after.dim()) < 2
    return not apart and bool(same_count(before.shape[-1:], after.shape[-1:]))


def _along_last(node: Any, names: tuple[str, ...]) -> bool:
    """Whether a node is one of some operations, along the last dimension of its input."""
    if not isinstance(node, fx.Node) or op_name(node) not in names or not node.args:
        return False
    first = node.args[0]
    example = tensor(first[0] if isinstance(first, tuple | list) else first)
    dim = argument(node, 1, "dim")
    if example is None or not isinstance(dim, int):
        return False
    return dim % example.dim() == example.dim() - 1
