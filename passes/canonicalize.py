"""Bring equal spellings to one form, which later passes know."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from sparselora_fx._torch import is_erased
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import argument, has_side_effect, op_name, tensor
from sparselora_fx.ir.markers import DENSE
from sparselora_fx.rewrite.in_place import as_new, as_sum, last_slice
from sparselora_fx.rewrite.products import as_linear
from sparselora_fx.rewrite.rearranging import as_whole, without_transpose
from sparselora_fx.rewrite.respell import as_added, as_constant, as_leaky, as_product, called
from sparselora_fx.rewrite.rewrite import Rewrite

_INPUT_IS_NOT_FIRST = ("where", "searchsorted")  # of functions with an argument "input"
Spelling = Callable[[fx.Node], fx.Node | None]
_CAST_METHODS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous"}


def canonicalize(rewrite: Rewrite) -> int:
    """Pass a function's ``input`` and ``other`` by position; erase casts to the dtype a tensor
    already has and dropout that is off; in graphs with sparse linears bring other equal spellings
    to one form (`_spellings`), and write a buffer that is filled slice by slice as a concatenation.
    Returns the changes.

    Before:  y: f32 = linear(input=x, weight=w);  z: f32 = y.to(float32);  u = dropout(z, p=0.0)
             v = silu(u)
             k = new_empty(..., m + n);  k[..., :m].copy_(a);  k[..., m:].copy_(b)
             h *= 2.0;  z = tensordot(h, w, 1);  t = silu(h.mT).mT
    After:   y: f32 = linear(x, weight=w);  v = silu(y)
             k = cat((a, b), -1)
             h2 = h * 2.0;  z = matmul(h2, w);  t = silu(h2)
    Keeps:   every value bit for bit (`Tensor.to` with nothing to do returns its input; so does
             dropout that is off), but for the rounding of the spellings. Without a sparse linear
             none of these is changed.
    Source:  canonical forms, as in any compiler's peephole pass.
    """
    erased = 0
    for node in rewrite.graph.nodes:
        erased += _pass_by_position(node)
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            rewrite.graph.erase_node(node)
            erased += 1
    weights = _sparse_weights(rewrite.graph)
    for spell in _spellings(weights) if weights else ():
        for node in list(rewrite.graph.nodes):
            erased += not is_erased(node) and spell(node) is not None
    for node in list(rewrite.graph.nodes) if weights else ():
        if op_name(node) in ("new_empty", "empty", "empty_like"):
            erased += _filled_to_cat(rewrite.graph, node)
    return erased


def _sparse_weights(graph: fx.Graph) -> set[fx.Node]:
    """The weights of linears that may be sliced: without one no value may change."""
    marks = (node for node in graph.nodes if op_name(node) == "site")
    return {node.args[1] for node in marks if node.args[5] != DENSE}


def _spellings(weights: set[fx.Node]) -> tuple[Spelling, ...]:
    """The rules that may change a value in its rounding, in their order."""
    return (
        as_new,  # first: what writes in place is no function
        as_sum,
        as_product,
        as_leaky,
        as_constant,
        as_added,
        partial(as_linear, weights=weights),
        without_transpose,
        as_whole,
    )


def _pass_by_position(node: fx.Node) -> bool:
    if node.op != "call_function" or op_name(node) in _INPUT_IS_NOT_FIRST:
        return False
    args, kwargs = list(node.args), dict(node.kwargs)
    for place, name in enumerate(("input", "other")):
        if len(args) == place and name in kwargs:
            args.append(kwargs.pop(name))
    if len(args) == len(node.args):
        return False
    node.args, node.kwargs = tuple(args), kwargs
    return True


def _filled_to_cat(graph: fx.Graph, buffer: fx.Node) -> bool:
    """Replace a buffer whose last dimension is written once, piece by piece, before it is read."""
    whole = tensor(buffer)
    if whole is None or whole.dim() == 0:
        return False
    users = [node for node in graph.nodes if buffer in node.all_input_nodes]
    pieces: list[_Piece] = []
    own: list[fx.Node] = []
    for user in users:
        found = _write(user, whole)
        if found is None:
            break
        pieces.append(found[0])
        own += found[1]
    pieces.sort()
    readers = [user for user in users if user not in own]
    interleaved = _is_interleaved(pieces, whole)
    if not (interleaved or _is_row(pieces, whole)):
        return False
    if not readers or not _in_order(graph, own, readers):
        return False
    sources = tuple(piece.source for piece in pieces)
    with graph.inserting_before(max(own, key=list(graph.nodes).index).next):
        if interleaved:
            joined = called(torch.flatten, called(torch.stack, sources, -1), -2)
        else:
            joined = graph.call_function(torch.cat, (sources,), {"dim": -1})
    joined.meta = dict(buffer.meta)
    buffer.replace_all_uses_with(joined, delete_user_cb=lambda user: user in readers)
    for node in reversed(own):
        graph.erase_node(node)
    graph.erase_node(buffer)
    return True


class _Piece(NamedTuple):
    """``buffer[..., start:stop:step] = source``."""

    start: int
    stop: int
    step: int
    source: fx.Node


def _is_row(pieces: list[_Piece], whole: torch.Tensor) -> bool:
    """Whether the pieces stand side by side and fill the buffer."""
    ends = [0, *(piece.stop for piece in pieces)]
    starts = [*(piece.start for piece in pieces), whole.shape[-1]]
    return ends == starts and len(pieces) > 0 and {piece.step for piece in pieces} == {1}


def _is_interleaved(pieces: list[_Piece], whole: torch.Tensor) -> bool:
    """Whether of n pieces each fills every n-th element."""
    count, width = len(pieces), whole.shape[-1]
    in_turn = [(p.start, p.step) for p in pieces] == [(i, count) for i in range(count)]
    return count > 1 and in_turn and width % count == 0 and all(p.stop == width for p in pieces)


def _write(user: fx.Node, whole: torch.Tensor) -> tuple[_Piece, list[fx.Node]] | None:
    """A piece of a buffer that a call fills, and the nodes of that call."""
    nodes: list[fx.Node] = [user]
    source: Argument = None
    if op_name(user) == "setitem":
        source = user.args[2]
    elif op_name(user) == "getitem" and len(user.users) == 1:
        copy = next(iter(user.users))
        nodes.append(copy)
        if op_name(copy) == "copy_" and copy.args[0] is user and len(copy.args) == 2:
            source = copy.args[1]
    values = tensor(source) if isinstance(source, fx.Node) else None
    bounds = last_slice(user.args[1], whole) if len(user.args) > 1 else None
    if values is None or nodes[-1].users or bounds is None:
        return None
    assert isinstance(source, fx.Node)
    size = len(range(*bounds))
    same = values.dtype == whole.dtype and same_shape(values.shape, (*whole.shape[:-1], size))
    return (_Piece(*bounds, source), nodes) if same else None


def _in_order(graph: fx.Graph, own: list[fx.Node], readers: list[fx.Node]) -> bool:
    """Whether every read comes after the last write, and nothing else is changed between them."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    first, last = min(own, key=order.__getitem__), max(own, key=order.__getitem__)
    between = list(graph.nodes)[order[first] : order[last]]
    others = any(has_side_effect(node) for node in between if node not in own)
    return not others and order[last] < min(order[node] for node in readers)


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None:
        return False
    name = op_name(node)
    if name == "dropout":
        off = argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False
        return off and argument(node, 3, "inplace", False) is False
    if name not in _CAST_METHODS or argument(node, 4, "copy", False) is not False:
        return False
    copies = any(arg is True for arg in node.args[1:])  # x.to(device, dtype, non_blocking, copy)
    same = before.dtype == after.dtype and before.device == after.device
    contiguous = name != "contiguous" or before.is_contiguous()
    return same and contiguous and not copies and not node.kwargs.get("memory_format")
