"""A quantised weight in a graph: the input that holds it, and the matrix that stands for it."""

from __future__ import annotations

from torch import fx

from sparselora_fx.graph.nodes import op_name


def matrix_of(weight: fx.Node) -> fx.Node:
    """What a graph multiplies in the place of a weight: the weight, or what it unpacks to
    (`expand_packed`)."""
    made = [user for user in weight.users if op_name(user) == "unpack" and user.args[0] is weight]
    return made[0] if len(made) == 1 else weight


def stored(matrix: fx.Node) -> fx.Node:
    """The input of the graph behind `matrix_of`."""
    if op_name(matrix) != "unpack":
        return matrix
    packed = matrix.args[0]
    assert isinstance(packed, fx.Node)
    return packed


def is_packed(matrix: fx.Node) -> bool:
    """Whether a site's weight stands for a quantised one."""
    return op_name(matrix) == "unpack"
