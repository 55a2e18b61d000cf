"""What the passes that move gathers towards producers have in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from sparselora_fx._torch import is_erased
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.mutation import is_mutated
from sparselora_fx.graph.nodes import argument, op_name, operand, tensor
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.ops import OPS


class Moved(NamedTuple):
    """What replaces a gather, and the new gathers that may move further."""

    node: fx.Node
    gathers: list[fx.Node]


def hoist_all(
    graph: fx.Graph,
    target: torch._ops.OpOverload,
    rule: Callable[[fx.Node, fx.Node], Moved | None],
) -> int:
    """Apply ``rule(gather, source)`` until none applies, past nodes that nothing but such gathers
    reads. A gather that another reader holds up is tried again when that reader has gone. What is
    written in place is read where it was read."""
    moves = 0
    changed: dict[fx.Node, bool] = {}

    def stays(node: fx.Node) -> bool:
        if node not in changed:
            changed[node] = is_mutated(node)
        return changed[node]

    todo = dict.fromkeys(node for node in graph.nodes if node.target is target)
    while todo:
        gather, _ = todo.popitem()
        if is_erased(gather) or not isinstance(source := gather.args[0], fx.Node):
            continue
        if not all(user.target is target for user in source.users):
            continue
        if any(map(stays, (source, *source.all_input_nodes))):
            continue
        moved = rule(gather, source)
        if moved is None:
            continue
        gather.replace_all_uses_with(moved.node)
        graph.erase_node(gather)
        lost = [source, *erase_unread(graph, source)]
        waiting = [user for node in lost for user in node.users if user.target is target]
        todo |= dict.fromkeys([*waiting, *moved.gathers])
        moves += 1
    return moves


def erase_unread(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Erase a node that nothing reads any more, so that its inputs are seen to have gathers as
    their only readers. Returns the nodes that lost a reader."""
    if node.users or node.op == "placeholder":
        return []
    inputs = node.all_input_nodes
    graph.erase_node(node)
    lost = list(inputs)
    for source in inputs:
        if op_name(source) in ("getitem", "chunk", "split"):
            lost += erase_unread(graph, source)
    return lost


def token_gather_of(graph: fx.Graph, node: fx.Node, lists: tuple[fx.Node, ...]) -> fx.Node:
    """``gather_tokens(node, *lists)``, one for all readers."""
    return _gather_of(graph, OPS.gather_tokens.default, node, lists)


def channel_gather_of(graph: fx.Graph, node: fx.Node, idx: fx.Node) -> fx.Node:
    """``gather_channels(node, idx)``, one for all readers."""
    return _gather_of(graph, OPS.gather_channels.default, node, (idx,))


def _gather_of(
    graph: fx.Graph, target: torch._ops.OpOverload, node: fx.Node, index: tuple[fx.Node, ...]
) -> fx.Node:
    """A gather that stands right after what it reads, where every reader finds it; one of its own
    at the insertion point if something writes into the node."""
    if is_mutated(node):
        return graph.call_function(target, (node, *index))
    after = max(_after_inputs(n) for n in (node, *index))
    known = next((u for u in node.users if u.target is target and u.args[1:] == index), None)
    if known is not None:
        after.append(known)
        return known
    with graph.inserting_after(after):
        return graph.call_function(target, (node, *index))


def share(graph: fx.Graph, target: torch._ops.OpOverload) -> int:
    """Let equal gathers of one value be the first of them. Returns how many went."""
    first: dict[Hashable, fx.Node] = {}
    gone = 0
    for gather in graph.find_nodes(op="call_function", target=target):
        known = first.setdefault(gather.args, gather)
        if known is not gather and not is_mutated(operand(gather)):
            gather.replace_all_uses_with(known)
            graph.erase_node(gather)
            gone += 1
    return gone


def _after_inputs(node: fx.Node) -> fx.Node:
    """The node itself, or for a graph's input the last input."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def is_whole(node: fx.Node) -> bool:
    """Whether a node is ``x[:, 0:, :]``, all of a tensor in its own shape."""
    key = node.args[1] if op_name(node) == "getitem" else None
    whole = (Ellipsis, slice(None), slice(0, None), slice(0, None, 1), slice(None, None, 1))
    return isinstance(key, tuple) and all(any(k == w for w in whole) for k in key)


def keeps_last(node: fx.Node) -> bool:
    """Whether a node is a reshape that moves tokens only."""
    if op_name(node) not in ("view", "reshape", "flatten", "unsqueeze", "squeeze"):
        return False
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None or min(before.dim(), after.dim()) < 2:
        return False
    return isinstance(before.shape[-1], int) and same_shape(before.shape[-1:], after.shape[-1:])


def slice_of(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """``(parent, start, step)`` when a node is ``parent[..., start::step]`` or one piece of a
    last-dimension split."""
    parent = node.args[0] if node.args else None
    if op_name(node) != "getitem" or not isinstance(parent, fx.Node):
        return None
    key = node.args[1]
    if isinstance(key, int) and op_name(parent) in ("chunk", "split"):
        return _piece_of(parent, key)
    example = tensor(parent)
    if example is None or not isinstance(key, tuple) or not isinstance(key[-1], slice):
        return None
    lead = key[:-1]
    plain = all(k is Ellipsis or k == slice(None) for k in lead)
    full = Ellipsis in lead or len(key) == example.dim()
    start, step = key[-1].start or 0, key[-1].step or 1
    if not (plain and full and isinstance(start, int) and isinstance(step, int)):
        return None
    return parent, start % int(example.shape[-1]), step


def _piece_of(split: fx.Node, key: int) -> tuple[fx.Node, int, int] | None:
    whole, pieces = split.args[0], split.meta.get("example_value")
    example = tensor(whole)
    axis = argument(split, 2, "dim", 0)
    if example is None or not isinstance(pieces, tuple | list):
        return None
    if axis % example.dim() != example.dim() - 1:
        return None
    assert isinstance(whole, fx.Node)
    return whole, sum(int(piece.shape[-1]) for piece in pieces[:key]), 1


def dropout_mask(graph: fx.Graph, source: fx.Node) -> fx.Node | None:
    """The random mask (with its scale) of a dropout, drawn once, where and as the dropout itself
    would draw it."""
    if argument(source, 3, "inplace", False) is not False or "sparselora_mask_of" in source.meta:
        return None
    known = source.meta.get("sparselora_mask")
    if isinstance(known, fx.Node):
        return known
    with graph.inserting_before(source):
        ones = _ones_like(graph, operand(source))
        mask = graph.call_function(source.target, (ones, *source.args[1:]), dict(source.kwargs))  # type: ignore[arg-type]
    mask.meta["sparselora_mask_of"] = source
    source.meta["sparselora_mask"] = mask
    return mask


def _ones_like(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Ones in the shape of a node, which does not read the node: as a reader it would keep gathers
    from moving past it."""
    example = tensor(node)
    assert example is not None
    root, rank = _rows_of(node), example.dim() - 1
    sizes: list[Argument] = [graph.call_method("size", (root, i)) for i in range(rank)]
    shape = (*sizes, int(example.shape[-1]))
    return graph.call_method("new_ones", (root, shape), {"dtype": example.dtype})


def _rows_of(node: fx.Node) -> fx.Node:
    """A node whose leading dimensions are those of another, as far before it as can be told."""
    while True:
        name, inputs = op_name(node), node.all_input_nodes
        if node.target is OPS.scatter_two_lists.default:
            return operand(node, 3)
        if name in ("linear", "sliced_linear", "scatter_channels") or slice_of(node):
            before = node.args[0]
        elif is_pointwise(node):
            before = next((n for n in inputs if _same_rows(n, node)), None)
        else:
            return node
        if not isinstance(before, fx.Node) or op_name(before) in ("chunk", "split"):
            return node
        node = before


def _same_rows(before: fx.Node, after: fx.Node) -> bool:
    first, second = tensor(before), tensor(after)
    if first is None or second is None:
        return False
    return same_shape(first.shape[:-1], second.shape[:-1])
