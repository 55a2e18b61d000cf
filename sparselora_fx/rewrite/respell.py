"""Other spellings of what the passes know, rewritten to the one they know.

Each rule gives the node to read instead, or None where it does not apply. Values are the same up to
the rounding of a product that is scaled before or after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.node import Argument
from torch.utils._pytree import tree_leaves

from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import argument, axis_argument, changes_input, op_name, tensor
from sparselora_fx.graph.pointwise import is_pointwise

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
        part = other if factor == 1 else called(torch.mul, other, factor)
        new = instead(node, torch.add, base, part)
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
        product = called(_PRODUCTS[op_name(node)], left, right)
        part = product if factor == 1 else called(torch.mul, product, factor)
        return instead(node, torch.add, base, part)


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
        halves = called(torch.chunk, x, 2, -1)
        half, gate = (called(operator.getitem, halves, i) for i in (0, 1))
        return instead(node, torch.mul, half, called(torch.sigmoid, gate))


def as_leaky(node: fx.Node) -> fx.Node | None:
    """A randomised leaky ReLU where it draws nothing.

    rrelu(x, lower, upper, training=False)  ->  leaky_relu(x, (lower + upper) / 2)
    """
    given = argument(node, 3, "training", False), argument(node, 4, "inplace", False)
    if op_name(node) != "rrelu" or given != (False, False):
        return None
    with node.graph.inserting_before(node):
        x, slope = argument(node, 0, "input"), rrelu_slope(node)
        return instead(node, torch.nn.functional.leaky_relu, x, slope)


def rrelu_slope(node: fx.Node) -> float:
    """The mean slope of a randomised leaky ReLU below zero."""
    low, high = argument(node, 1, "lower", 1 / 8), argument(node, 2, "upper", 1 / 3)
    return float(low + high) / 2


def as_constant(node: fx.Node) -> fx.Node | None:
    """A tensor of one number, in the shape of another one, where a single element does as well.

    h * full_like(h, c), where(m, h, zeros_like(h))  ->  h * full((1,), c), ...
    """
    example, numbers = tensor(node), {"zeros_like": 0, "ones_like": 1}
    number = numbers.get(op_name(node), argument(node, 1, "fill_value"))
    if op_name(node) not in (*numbers, "full_like") or example is None:
        return None
    if not isinstance(number, int | float) or not all(_broadcasts(u, node) for u in node.users):
        return None
    options: dict[str, Argument] = {"dtype": example.dtype, "device": example.device}
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.full, ((1,), number), options)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _broadcasts(user: fx.Node, operand: fx.Node) -> bool:
    """Whether a pointwise call has its result's shape by its other operands alone."""
    made = tensor(user)
    others = [tensor(n) for n in user.all_input_nodes if n is not operand]
    if made is None or not any(o is not None and same_shape(o.shape, made.shape) for o in others):
        return False
    return is_pointwise(user)


def as_added(node: fx.Node) -> fx.Node | None:
    """Something that is added to some tokens only, as added to all.

    where(m, y + z, y), where(m, y, y + z)  ->  y + masked_fill(z, ~m, 0), y + masked_fill(z, m, 0)
    """
    if op_name(node) != "where" or len(node.args) != 3:
        return None
    mask, first, second = node.args
    for total, base in ((first, second), (second, first)):
        if not (isinstance(total, fx.Node) and isinstance(base, fx.Node)):
            continue
        if op_name(total) not in ("add", "__add__") or total.kwargs or [*total.users] != [node]:
            continue
        if total.args[0] is not base or not _is_like(total.args[1], node):
            continue
        z = total.args[1]
        with node.graph.inserting_before(node):
            hidden = called(torch.logical_not, mask) if total is first else mask
            new = instead(node, torch.add, base, called("masked_fill", z, hidden, 0.0))
        drop(total)
        return new
    return None


def _is_like(other: object, node: fx.Node) -> bool:
    a, b = tensor(other), tensor(node)
    return a is not None and b is not None and a.dtype == b.dtype and same_shape(a.shape, b.shape)


def called(function: Callable[..., object] | str, *args: Argument, **kwargs: Argument) -> fx.Node:
    """A call of a function, or of a method by its name, at the graph's insertion point."""
    graph = next(arg for arg in tree_leaves(args) if isinstance(arg, fx.Node)).graph
    if isinstance(function, str):
        return graph.call_method(function, args, kwargs)
    return graph.call_function(function, args, kwargs)


def columns(source: fx.Node, kept: slice) -> fx.Node:
    """``source[..., kept]``, at the graph's insertion point."""
    key = (Ellipsis, kept)  # fx carries it, though its type of arguments does not name it
    return source.graph.call_function(operator.getitem, (source, key))  # type: ignore[arg-type]


def drop(node: object) -> None:
    """Erase a call that nobody reads, and what it alone has read."""
    if (
        not isinstance(node, fx.Node)
        or node.users
        or node.op not in ("call_function", "call_method")
    ):
        return
    if not changes_input(node):
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for source in inputs:
            drop(source)


def instead(old: fx.Node, function: Callable[..., object], *args: Argument) -> fx.Node:
    """A call in the place of another one."""
    new = old.graph.call_function(function, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new
