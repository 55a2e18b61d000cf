"""Calls that write in place, as functions that return a new tensor: whoever read the old value goes
on reading it, later readers read the result."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.mutation import shares_memory
from sparselora_fx.graph.nodes import argument, changes_input, given_place, op_name, tensor
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.rewrite.respell import called

_OPERATORS = {
    "iadd": operator.add,
    "isub": operator.sub,
    "imul": operator.mul,
    "itruediv": operator.truediv,
    "ipow": operator.pow,
}
_SUMS = {"add", "iadd", "add_", "__add__"}


def as_new(node: fx.Node) -> fx.Node | None:
    """A pointwise function (or dropout) that writes its result over its first argument.

    h *= g, h.mul_(g), relu_(h), relu(h, inplace=True)  ->  mul(h, g), ..., relu(h)
    """
    base = argument(node, 0, "input")
    if not changes_input(node) or not isinstance(base, fx.Node) or tensor(base) is None:
        return None
    if not _is_own(base, node, ()):
        return None
    with node.graph.inserting_before(node):
        new = _functional(node)
    if new is None:
        return None
    before, after = tensor(base), tensor(new)
    same = after is not None and before is not None and after.dtype == before.dtype
    same = same and same_shape(after.shape, before.shape)  # type: ignore[union-attr]
    if not same or not (is_pointwise(new) or op_name(new) in ("dropout", "rrelu")):
        node.graph.erase_node(new)
        return None
    _replace(base, node, new)
    return new


def as_sum(node: fx.Node) -> fx.Node | None:
    """Something added to some of the last dimension, as added to all of it.

    y[..., a:b] += z,  y[..., a:b] = y[..., a:b] + z   ->  y + pad(z, (a, N - b))
    """
    if op_name(node) != "setitem":
        return None
    base, key, total = node.args
    if not isinstance(base, fx.Node) or not isinstance(total, fx.Node) or len(total.args) != 2:
        return None
    part, other = total.args
    whole = tensor(base)
    bounds = None if whole is None else last_slice(key, whole)
    if op_name(total) not in _SUMS or bounds is None or not isinstance(part, fx.Node):
        return None
    if op_name(part) != "getitem" or part.args != (base, key):
        return None
    if [*part.users] != [total] or [*total.users] != [node] or node.users:
        return None
    given, read = tensor(other), tensor(part)
    if given is None or read is None or given.dtype != read.dtype:
        return None
    if not same_shape(given.shape, read.shape):
        return None
    start, stop, step = bounds
    if step != 1 or not _is_own(base, node, (part,)):
        return None
    assert whole is not None
    with node.graph.inserting_before(node):
        around = (start, int(whole.shape[-1]) - stop)
        padded = other if around == (0, 0) else called(F.pad, other, around)
        new = called(torch.add, base, padded)
    _replace(base, node, new)
    for old in (total, part):
        node.graph.erase_node(old)
    return new


def last_slice(key: object, whole: torch.Tensor) -> tuple[int, int, int] | None:
    """``(start, stop, step)`` of an index ``[..., start:stop:step]`` of numbers, or None."""
    if not isinstance(key, tuple) or not isinstance(key[-1], slice):
        return None
    *before, last = key
    full = Ellipsis in before or len(key) == whole.dim()
    if not full or any(k is not Ellipsis and k != slice(None) for k in before):
        return None
    numbers = (whole.shape[-1], last.start, last.stop, last.step)
    if not all(isinstance(n, int | None) for n in numbers):
        return None
    start, stop, step = last.indices(int(whole.shape[-1]))
    return start, stop, step


def _is_own(base: fx.Node, node: fx.Node, ignored: tuple[fx.Node, ...]) -> bool:
    """Whether a tensor's memory is no other's until a call writes into it: it is no view, and no
    view of it was taken."""
    if base.op not in ("call_function", "call_method"):
        return False
    if any(shares_memory(base, source) for source in base.all_input_nodes):
        return False
    later = _later(node)
    early = [user for user in base.users if user not in later and user not in (node, *ignored)]
    return not any(shares_memory(user, base) for user in early)


def _later(node: fx.Node) -> set[fx.Node]:
    found = set()
    while node.op != "output":
        node = node.next
        found.add(node)
    return found


def _replace(base: fx.Node, node: fx.Node, new: fx.Node) -> None:
    """Let ``new`` be read instead of a call that wrote into ``base``, and of ``base`` after it."""
    later = _later(node)
    node.replace_all_uses_with(new)
    base.replace_all_uses_with(new, delete_user_cb=lambda user: user in later)
    node.graph.erase_node(node)


def _functional(node: fx.Node) -> fx.Node | None:
    """The call that returns what another one writes, at the graph's insertion point."""
    name = op_name(node)
    if name in _OPERATORS:
        return called(_OPERATORS[name], *node.args)
    if name.endswith("_") and not name.endswith("__"):
        if node.op == "call_method":
            known = hasattr(torch.Tensor, name[:-1])
            return called(name[:-1], *node.args, **node.kwargs) if known else None
        function = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        return None if function is None else called(function, *node.args, **node.kwargs)
    place = given_place(node, "inplace")
    if place is None or not callable(node.target):
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(place, int):
        args[place] = False
    else:
        kwargs[place] = False
    return called(node.target, *args, **kwargs)
