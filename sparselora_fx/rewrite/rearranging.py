"""Moves of data that are taken back later, taken out: a transpose there and back, halves that are
joined again."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx
from torch.fx.node import Argument

from sparselora_fx.analysis.channel_moves import order_of
from sparselora_fx.graph.emit import copied
from sparselora_fx.graph.nodes import argument, axis_argument, op_name, operand, tensor, value
from sparselora_fx.graph.op_families import PERMUTES
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.rewrite.respell import called, drop

_SPLITS = ("chunk", "split", "tensor_split", "split_with_sizes")


def without_transpose(node: fx.Node) -> fx.Node | None:
    """A function of transposed tensors, transposed back.

    f(x.mT, y.mT, c).mT  ->  f(x, y, c)         f pointwise, c a number
    """
    order = _order(node)
    source = node.args[0] if node.args else None
    if order is None or not isinstance(source, fx.Node) or not _permutes(source, order, node):
        return None
    with node.graph.inserting_before(node):
        new = _permuted(source, order, {})
    node.replace_all_uses_with(new)
    drop(node)
    return new


def _order(node: fx.Node) -> list[int] | None:
    """Which axis of its input each axis of a permuted tensor is; None for anything else."""
    name, source = op_name(node), tensor(node.args[0]) if node.args else None
    attribute = name == "getattr" and node.args[1] in ("mT", "T")
    if source is None or not (name in PERMUTES or attribute):
        return None
    return order_of(node, name, source.dim())


def _permutes(node: fx.Node, order: list[int], reader: fx.Node) -> bool:
    """Whether ``node.permute(order)`` can be had without permuting anything."""
    own = _order(node)
    if own is not None:
        return [own[axis] for axis in order] == list(range(len(order)))
    if {*node.users} - {reader} or not is_pointwise(node):
        return False
    return all(_permutes(n, order, node) for n in node.all_input_nodes if not _is_number(n))


def _permuted(node: fx.Node, order: list[int], done: dict[fx.Node, fx.Node]) -> fx.Node:
    if _order(node) is not None:
        return node.args[0]  # type: ignore[return-value]
    if node not in done:
        inputs = [n for n in node.all_input_nodes if not _is_number(n)]
        done |= {n: _permuted(n, order, done) for n in inputs}
        done[node] = copied(node, lambda n: done.get(n, n))
    return done[node]


def _is_number(node: fx.Node) -> bool:
    example = tensor(node)
    return example is None or (example.dim() <= 1 and example.shape.numel() == 1)


def as_whole(node: fx.Node) -> fx.Node | None:
    """The pieces of a tensor joined again in their order, perhaps after the same function of each.

    a, b = chunk(h, 2, -1);  cat((f(a), f(b)), -1)  ->  f(h)      f pointwise, of one tensor
    """
    pieces, out = argument(node, 0, "tensors"), tensor(node)
    if op_name(node) not in ("cat", "concat", "concatenate") or out is None:
        return None
    axis = axis_argument(node, 1, "dim", out.dim())
    with node.graph.inserting_before(node):
        new = _joined(list(pieces), axis)
    if new is None:
        return None
    node.replace_all_uses_with(new)
    drop(node)
    return new


def _joined(given: Sequence[Argument], axis: int) -> fx.Node | None:
    pieces = [piece for piece in given if isinstance(piece, fx.Node)]
    if len(pieces) != len(given) or len(pieces) < 2:
        return None
    first = pieces[0]
    if op_name(first) == "getitem" and op_name(operand(first)) in _SPLITS:
        return _split_whole(pieces, axis)
    alike = all(
        (p.op, p.target, p.args[1:], p.kwargs)
        == (first.op, first.target, first.args[1:], first.kwargs)
        for p in pieces
    )
    single = all(len(p.all_input_nodes) == 1 and len(p.users) == 1 for p in pieces)
    if not (alike and single and is_pointwise(first)):
        return None
    source = _joined([p.args[0] for p in pieces], axis)
    if source is None:
        return None
    target = first.target
    function = target if callable(target) else str(target)
    return called(function, source, *first.args[1:], **first.kwargs)


def _split_whole(pieces: list[fx.Node], axis: int) -> fx.Node | None:
    split = operand(pieces[0])
    found, source = value(split), tensor(split.args[0])
    if source is None or not isinstance(found, tuple | list) or len(found) != len(pieces):
        return None
    in_order = [(p.target, p.args) for p in pieces] == [
        (operator.getitem, (split, i)) for i in range(len(pieces))
    ]
    same = axis_argument(split, 2, "dim", source.dim()) == axis
    return operand(split) if in_order and same else None
