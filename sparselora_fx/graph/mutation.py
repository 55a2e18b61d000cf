"""Which nodes of a graph hold memory that the graph writes into.

A graph from Dynamo is not functional: after ``y = zeros(...); y[:, 1:] = x`` every reader reads the
node ``y``, and what it reads depends on where it stands. So a read of such a node must stay where
it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from sparselora_fx import _torch
from sparselora_fx.graph.nodes import changes_input, op_name
from sparselora_fx.graph.op_families import CASTS, PERMUTES, RESHAPES, SPLITS

# May return a view of their first argument. Nodes that passes make have no storage to compare.
_VIEWS = CASTS | RESHAPES | PERMUTES | SPLITS | {
    "getitem", "getattr", "narrow", "select", "mT", "T", "expand", "expand_as", "broadcast_to",
    "diagonal", "unfold", "real", "imag", "view_as_real", "view_as_complex", "as_strided", "ravel",
}  # fmt: skip


def is_mutated(node: fx.Node) -> bool:
    """Whether any call of the graph writes into the memory that a node's value is in, through the
    node itself or through anything that is a view of the same memory."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        for user in current.users:
            if changes_input(user) and any(current is target for target in _written(user)):
                return True
        near = [user for user in current.users if _is_view(user, current)]
        near += [source for source in current.all_input_nodes if _is_view(current, source)]
        todo += [other for other in near if other not in seen]
        seen.update(near)
    return False


def _written(call: fx.Node) -> Iterator[object]:
    """The operands that a call writes into."""
    schema = getattr(call.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        for place, known in enumerate(schema.arguments):
            if known.alias_info is not None and known.alias_info.is_write:
                held = call.args[place] if place < len(call.args) else call.kwargs.get(known.name)
                yield from tree_leaves(held)
        return
    yield from tree_leaves(call.args[:1])
    yield from tree_leaves(call.kwargs.get("out"))


def _is_view(made: fx.Node, source: fx.Node) -> bool:
    if op_name(made) in _VIEWS:
        return bool(made.args) and made.args[0] is source
    if changes_input(made) and any(source is target for target in _written(made)):
        return True
    return shares_memory(made, source)


def shares_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether the values of two nodes are in the same memory, as far as tracing has told."""
    first, second = _storages(a), _storages(b)
    return None in first | second or not first.isdisjoint(second)


def _storages(node: fx.Node) -> set[int | None]:
    leaves = tree_leaves(node.meta.get("example_value"))
    return {_torch.storage_key(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
