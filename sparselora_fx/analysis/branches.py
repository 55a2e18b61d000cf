"""LoRA branches: what is computed from a linear's input and small weights."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.regions import is_trainable
from sparselora_fx.graph.nodes import op_name, tensor

LINEAR_CASTS = {
    "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "detach", "clone",
}  # fmt: skip
_MAX_BRANCH = 64  # nodes; a LoRA branch is a handful


def adapter_branch(node: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The nodes of an expression that is computed from x and small weights alone (a LoRA branch),
    or None.

    Recognises any spelling (modules, `F.linear`, `@`, einsum, scaling, dropout, casts): the leaves
    decide, not the shape.

    Rule:   backward from the node, every leaf is x (or x before views and casts) or an input; some
            leaf is x, and some a matrix that trains.
    Sound:  what reads x and weights alone reads no other site's channels, so leaving it as it is
            changes nothing else. That it reads no frozen weight is asked by `reads`.
    """
    branch: set[fx.Node] = set()
    todo, reads_x, has_weight = [node], False, False
    sources = _before_views(x)
    while todo:
        current = todo.pop()
        if current in sources:
            reads_x = True
        elif current.op == "placeholder":
            example = tensor(current)
            has_weight |= example is not None and example.dim() >= 2 and is_trainable(current)
        elif current not in branch:
            branch.add(current)
            if len(branch) > _MAX_BRANCH:
                return None
            todo += current.all_input_nodes
    return branch if reads_x and has_weight else None


def reads(branch: set[fx.Node], nodes: frozenset[fx.Node] | set[fx.Node]) -> bool:
    """Whether a branch reads any of some nodes, or holds one."""
    return any(source in nodes for node in branch for source in (node, *node.all_input_nodes))


def _before_views(x: fx.Node) -> set[fx.Node]:
    """x, and what it was before views and casts (a Conv1D flattens its input; its LoRA branch
    reads the unflattened one)."""
    nodes = {x}
    while op_name(x) in (*LINEAR_CASTS, "view", "reshape", "flatten") and isinstance(
        x.args[0], fx.Node
    ):
        x = x.args[0]
        nodes.add(x)
    return nodes
