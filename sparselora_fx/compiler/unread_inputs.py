"""Inputs that nothing reads: hooks cannot know which weights will be producers and which consumers,
so each sparse weight comes with the factors of both."""

from __future__ import annotations

from collections.abc import Set

from torch import SymInt, fx

from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.nodes import tensor


def drop_unread(gm: fx.GraphModule, kept: Set[fx.Node]) -> list[int]:
    """Take the tensors that nothing reads off the inputs of a graph and of its bodies, but for
    those ``kept``: they would be passed at each call. Returns the places of the inputs that are
    left."""
    _drop_operands(gm)
    left = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node not in kept and _is_idle(node):
            gm.graph.erase_node(node)
        else:
            left.append(place)
    return left


def _drop_operands(gm: fx.GraphModule) -> None:
    """What nothing reads in a body is no longer passed to any call of it."""
    calls: dict[fx.GraphModule, list[fx.Node]] = {}
    for call, body, _ in bodies(gm):
        calls.setdefault(body, []).append(call)
    for body, all_of_it in calls.items():
        _drop_operands(body)
        inside = body.graph.find_nodes(op="placeholder")
        idle = [i for i, node in enumerate(inside) if _is_idle(node)]
        for call in all_of_it:
            before = len(call.args) - len(inside)  # the body, and a name perhaps
            call.args = tuple(a for i, a in enumerate(call.args) if i - before not in idle)
        for i in idle:
            body.graph.erase_node(inside[i])


def _is_idle(node: fx.Node) -> bool:
    """Whether an input is a tensor that nothing reads. One with symbolic sizes may be where they
    are read off."""
    given = tensor(node)
    if node.users or given is None:
        return False
    return not any(isinstance(size, SymInt) for size in (*given.shape, *given.stride()))
