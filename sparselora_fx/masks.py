"""Attention that hides padding: fused with a mask, or written out with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import (
    argument,
    axis_argument,
    is_pointwise,
    op_name,
    reads_shape_only,
    tensor,
)
from sparselora_fx.layout import same_count
from sparselora_fx.rows import ATTENTION, MATMULS
from sparselora_fx.values import CASTS

Nodes = set[fx.Node]
_MASKING = ("add", "__add__", "__radd__", "iadd", "where", "masked_fill")
_KEEPS_ZEROS = CASTS | {"dropout"}


def hides_padding(attention: fx.Node, node: fx.Node, masks: Nodes) -> bool:
    """Whether a call is part of an attention that reads a node as its keys or values, and gives
    those of padding no weight.

    Recognised are the fused attention with a mask, and the two products of
    ``softmax(cast(f(q @ k^T) + mask)) @ v`` with a pointwise f. ``masks`` are the nodes that may
    say which tokens are padding; how they say it (-inf, False, a large negative number) is not
    looked at.
    """
    name = op_name(attention)
    if name == ATTENTION:
        mask, keys = argument(attention, 3, "attn_mask"), argument(attention, 1, "key")
        read = node not in (mask, argument(attention, 0, "query"))
        return read and mask in masks and _fits(mask, tensor(keys), axis=-2)
    if name not in MATMULS or node is not argument(attention, 1, "other"):
        return False
    first = argument(attention, 0, "input")
    if node is first or not isinstance(first, fx.Node):
        return False
    return _is_hidden(attention, masks) or _is_zero(first, masks)


def key_axis(attention: fx.Node, node: fx.Node, masks: Nodes) -> int:
    """The token axis of what `hides_padding` has found: the last of transposed keys, else the one
    before it."""
    example = tensor(node)
    assert example is not None
    written_out = op_name(attention) in MATMULS and _is_hidden(attention, masks)
    return example.dim() - (1 if written_out else 2)


def _is_hidden(scores: fx.Node, masks: Nodes) -> bool:
    """Whether all that becomes of scores is masked and made probabilities of."""
    readers = [user for user in scores.users if not reads_shape_only(user, scores)]
    return bool(readers) and all(
        _is_masked(user, scores, masks) or (_is_plain(user, scores) and _is_hidden(user, masks))
        for user in readers
    )


def _is_masked(node: fx.Node, scores: fx.Node, masks: Nodes) -> bool:
    """Whether a node masks scores, and only a softmax reads it."""
    if not _masks(node, masks, but=scores):
        return False
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if op_name(user) in CASTS and user.users:
            todo += user.users
        elif not _is_softmax(user) and not reads_shape_only(user, node):
            return False
    return bool(node.users)


def _is_zero(probabilities: fx.Node, masks: Nodes) -> bool:
    """Whether a node holds probabilities, or what dropout leaves of them, of masked scores."""
    node: Any = probabilities
    while op_name(node) in _KEEPS_ZEROS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if not _is_softmax(node):
        return False
    node = argument(node, 0, "input")
    while op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return any(_masks(node, masks, but=source) for source in node.all_input_nodes)


def _masks(node: fx.Node, masks: Nodes, *, but: fx.Node) -> bool:
    """Whether a node joins another one with a mask along the last dimension."""
    whole = tensor(node)
    return op_name(node) in _MASKING and any(
        source is not but and source in masks and _fits(source, whole, axis=-1)
        for source in node.all_input_nodes
    )


def _fits(mask: Any, other: torch.Tensor | None, *, axis: int) -> bool:
    """Whether a mask has one value for each place of another tensor along an axis of that."""
    held = tensor(mask)
    if held is None or other is None or held.dim() == 0:
        return False
    return bool(same_count(held.shape[-1:], (other.shape[axis],)))


def _is_plain(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node leaves the places of scores as they are."""
    before, after = tensor(source), tensor(node)
    same = before is not None and after is not None and before.dim() == after.dim()
    return same and (op_name(node) in CASTS or is_pointwise(node))


def _is_softmax(node: Any) -> bool:
    example = tensor(node)
    if not isinstance(node, fx.Node) or op_name(node) != "softmax" or example is None:
        return False
    rank = example.dim()
    return axis_argument(node, 1, "dim", rank, -1) == rank - 1
