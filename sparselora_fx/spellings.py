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
from sparselora_fx.layout import same_count

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
    factor = argument(node, 2, "alpha", 1) * (-1 if "sub" in name else 1)
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


def as_matmul(node: fx.Node) -> fx.Node | None:
    """An einsum of two computed tensors that is one matrix product for each of its other indices.

    einsum("bqhd,bkhd->bhqk", q, k)  ->  matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1))
    """
    read = _equation(node)
    if read is None:
        return None
    (left, right, out), operands = read
    shared = [c for c in left if c in right and c not in out]
    own = [c for c in right if c not in left]
    rows = [c for c in left if c not in right]
    if len(shared) != 1 or len(own) != 1 or not rows or {*left, *own} - {*shared} != {*out}:
        return None
    (inner,), (column,) = shared, own
    terms = zip(operands, (left, right), strict=True)
    sizes = [n.meta["example_value"].shape[term.index(inner)] for n, term in terms]
    if not same_count(sizes[:1], sizes[1:]):
        return None  # one of them is 1: an einsum repeats it

    def arrangement(row: str) -> tuple[str, str, str]:
        """Both operands' and the product's indices, if this one counts its rows."""
        lead = "".join(c for c in out if c not in (row, column))
        return lead + row + inner, lead + inner + column, lead + row + column

    # Scores should stay as they are, [..., queries, keys]: as the left operand or as the result.
    fits = [arrangement(row) for row in rows]
    a, b, product = max(fits, key=lambda fit: 2 * (fit[0] == left) + (fit[2] == out))
    with node.graph.inserting_before(node):
        factors = _arranged(operands[0], left, a), _arranged(operands[1], right, b)
        if product == out:
            return _instead(node, torch.matmul, *factors)
        order = [product.index(c) for c in out]
        return _instead(node, torch.permute, _call(torch.matmul, *factors), order)


def _equation(node: fx.Node) -> tuple[tuple[str, str, str], tuple[fx.Node, fx.Node]] | None:
    """The three terms of ``a,b->c`` and both operands; None if an operand is an input of the graph
    (a weight), a term repeats an index, or the call is spelled another way."""
    if op_name(node) != "einsum" or not isinstance(node.args[0], str):
        return None
    operands: Any = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    computed = [isinstance(n, fx.Node) and n.op != "placeholder" for n in operands]
    terms = node.args[0].replace(" ", "").replace("->", ",").split(",")
    once = all(term.isalpha() and len(set(term)) == len(term) for term in terms)
    if computed != [True, True] or len(terms) != 3 or "->" not in node.args[0] or not once:
        return None
    return (terms[0], terms[1], terms[2]), operands


def _arranged(x: fx.Node, have: str, want: str) -> fx.Node:
    """x with its indices in another order, and size 1 where it lacks one."""
    order = [have.index(c) for c in want if c in have]
    x = x if order == sorted(order) else _call(torch.permute, x, order)
    for place, index in enumerate(want):
        if index not in have:
            x = _call(torch.unsqueeze, x, place)
    return x


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
