"""Inputs that nothing reads: hooks cannot know which weights will be producers and which consumers,
so each sparse weight comes with the factors of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor, fx

from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.nodes import value


def drop_unread(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Take the tensors that nothing reads off the inputs of a graph and of its bodies: they would
    be checked and passed at each call. Returns the places of the inputs that are left."""
    _drop_operands(gm)
    kept = []
    for place, (node, given) in enumerate(
        zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ):
        if _is_idle(node, given):
            gm.graph.erase_node(node)
        else:
            kept.append(place)
    gm.recompile()
    return kept


def _drop_operands(gm: fx.GraphModule) -> None:
    """What nothing reads in a body is no longer passed to any call of it."""
    calls: dict[fx.GraphModule, list[fx.Node]] = {}
    for call, body, _ in bodies(gm):
        calls.setdefault(body, []).append(call)
    for body, all_of_it in calls.items():
        _drop_operands(body)
        inside = body.graph.find_nodes(op="placeholder")
        idle = [i for i, node in enumerate(inside) if _is_idle(node, value(node))]
        for call in all_of_it:
            before = len(call.args) - len(inside)  # the body, and a name perhaps
            call.args = tuple(a for i, a in enumerate(call.args) if i - before not in idle)
        for i in idle:
            body.graph.erase_node(inside[i])
        body.recompile()


def _is_idle(node: fx.Node, given: Any) -> bool:
    """Whether an input is a tensor that nothing reads. One with symbolic sizes may be where they
    are read off."""
    if node.users or not isinstance(given, Tensor):
        return False
    return not any(isinstance(size, SymInt) for size in (*given.shape, *given.stride()))
