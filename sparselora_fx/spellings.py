"""Other spellings of what the passes know, rewritten to the one they know.

Each rule gives the node to read instead, or None where it does not apply. Values are the same up to
the rounding of a product that is scaled before or after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import argument, axis_argument, op_name, tensor, value

_IN_PLACE = {"iadd", "add_", "isub", "sub_"}
_ADDITIONS = _IN_PLACE | {"add", "sub", "__sub__"}
_PRODUCTS = {"addmm": torch.mm, "baddbmm": torch.bmm}


def as_addition(base: fx.Node) -> fx.Node | None:
    """``base + other`` for anything that adds to a linear's output, and takes its place.

    base.add(z, alpha=a), base - z      ->  base + z * a, base + -z
    base += z, base.add_(z)             ->  base + z           (what reads base does so later)
    addmm(base, h, B), baddbmm(...)     ->  base + mm(h, B)
    """
    node = next((user for user in base.users if op_name(user) in _IN_PLACE), None)
    if node is None:
        node = next(iter(base.users)) if len(base.users) == 1 else None
    elif not _is_first(node, base):
        return None  # somebody has read the value before, or has a view of it
    if node is None or argument(node, 0, "input") is not base:
        return None
    name, other = op_name(node), argument(node, 1, "other")
    if name in _PRODUCTS:
        return _unfused(node, base)
    if name not in _ADDITIONS or not isinstance(other, fx.Node):
        return None
    alpha = argument(node, 2, "alpha", 1)
    if isinstance(alpha, fx.Node):
        return None  # a number that the graph computes
    factor = -alpha if "sub" in name else alpha
    if name in _IN_PLACE and not _same_kind(base, other):
        return None  # the sum would not have the base's shape and dtype
    if name not in _IN_PLACE and factor == 1:
        return None
    with node.graph.inserting_before(node):
        part = other if factor == 1 else _call(torch.mul, other, factor)
        new = _instead(node, torch.add, base, part)
    base.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _is_first(node: fx.Node, base: fx.Node) -> bool:
    """Whether a reader comes before all others."""
    later = set()
    while node.op != "output":
        node = node.next
        later.add(node)
    return len(later.intersection(base.users)) == len(base.users) - 1


def _unfused(node: fx.Node, base: fx.Node) -> fx.Node | None:
    given, made = tensor(base), tensor(node)
    same = given is not None and made is not None and given.dim() == made.dim()
    if not same or argument(node, 3, "beta", 1) != 1:
        return None
    factor = argument(node, 4, "alpha", 1)
    names = ("mat1", "mat2") if op_name(node) == "addmm" else ("batch1", "batch2")
    left, right = (argument(node, i + 1, key) for i, key in enumerate(names))
    with node.graph.inserting_before(node):
        product = _call(_PRODUCTS[op_name(node)], left, right)
        part = product if factor == 1 else _call(torch.mul, product, factor)
        return _instead(node, torch.add, base, part)


def _same_kind(base: fx.Node, other: fx.Node) -> bool:
    a, b = tensor(base), tensor(other)
    return a is not None and b is not None and (a.dtype, a.dim()) == (b.dtype, b.dim())


def as_product(node: fx.Node) -> fx.Node | None:
    """A gated linear unit over channels, written out.

    glu(x, -1)  ->  a, b = chunk(x, 2, -1);  a * sigmoid(b)
    """
    x = argument(node, 0, "input")
    example = tensor(x)
    if op_name(node) != "glu" or example is None:
        return None
    if axis_argument(node, 1, "dim", example.dim(), -1) != example.dim() - 1:
        return None
    with node.graph.inserting_before(node):
        halves = _call(torch.chunk, x, 2, -1)
        half, gate = (_call(operator.getitem, halves, i) for i in (0, 1))
        return _instead(node, torch.mul, half, _call(torch.sigmoid, gate))


def _call(function: Callable[..., Any], *args: Any) -> fx.Node:
    """A call at the graph's insertion point, with its example value."""
    graph = next(arg for arg in args if isinstance(arg, fx.Node)).graph
    node = graph.call_function(function, args)
    with torch.enable_grad():
        node.meta["example_value"] = function(*map(value, args))
    return node


def _instead(old: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    """A call in the place of another one."""
    new = old.graph.call_function(function, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new
