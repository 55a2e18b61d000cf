"""Sliced matmuls that belong together in one launch, on a GPU."""

from __future__ import annotations

from collections.abc import Hashable
from operator import getitem

import torch
from torch import Tensor, fx

from sparselora_fx import environment
from sparselora_fx.graph.emit import lowered_call
from sparselora_fx.ir import joint_ops  # noqa: F401 - defines the ops
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.dependence import Order, order_of, waits
from sparselora_fx.lowering.inductor import sort_nodes

_LINEAR, _DGRAD = OPS.sliced_linear.default, OPS.sliced_linear_dgrad.default
_LINEARS, _DGRADS = OPS.sliced_linears.default, OPS.sliced_linear_dgrads.default
_ADD = torch.ops.aten.add.Tensor


def join_sliced(graph: fx.Graph) -> int:
    """Join sums of sliced gradients (of gate and up; of queries, keys and values), and sliced
    matmuls of one input that are alike (of keys and values). Returns the matmuls joined.

    Before:  a = sliced_linear(x, wk, i);  b = sliced_linear(x, wv, j)
             c = sliced_linear_dgrad(gk, wk, i) + sliced_linear_dgrad(gv, wv, j)
    After:   a, b = sliced_linears(x, [wk, wv], [i, j])
             c = sliced_linear_dgrads([gk, gv], [wk, wv], [i, j])

    Where the lowering finds no template to compute them at once, it computes each, as before.
    Matmuls whose results meet in pointwise work (of gate and up) stay two: the second one takes
    that work in, and a joint one could not. A post-grad pass of Inductor: nodes are those of aten.
    """
    return _join_sums(graph) + _join_products(graph)


def _join_sums(graph: fx.Graph) -> int:
    joined = 0
    for node in graph.find_nodes(op="call_function", target=_ADD):
        terms = list(node.args)
        if len(terms) != 2 or node.kwargs or not all(_is_term(t, node) for t in terms):
            continue
        products = [product for term in terms for product in _products(term)]
        with graph.inserting_before(node):
            total = lowered_call(graph, _DGRADS, *map(list, zip(*products, strict=True)))
            node.replace_all_uses_with(total)
        for erased in dict.fromkeys((node, *terms)):
            graph.erase_node(erased)
        joined += sum(term.target is _DGRAD for term in terms)
    return joined


def _products(term: fx.Node) -> list[tuple[object, ...]]:
    """What each product of a sliced gradient multiplies: ``(gy, w, idx)``."""
    return [term.args] if term.target is _DGRAD else list(zip(*term.args, strict=True))


def _is_term(term: object, total: fx.Node) -> bool:
    """Whether a sum's term is a sliced gradient that only the sum reads."""
    if not isinstance(term, fx.Node) or term.target not in (_DGRAD, _DGRADS):
        return False
    value, whole = term.meta["val"], total.meta["val"]
    alike = value.dtype == whole.dtype and _sizes(value) == _sizes(whole)
    return alike and len(term.users) == 1 and environment.shares_launches(value.device.type)


def _join_products(graph: fx.Graph) -> int:
    joined = 0
    while group := _alike(graph, order_of(graph)):
        x, ws, indices = group[0].args[0], [n.args[1] for n in group], [n.args[2] for n in group]
        with graph.inserting_before(group[-1]):
            results = lowered_call(graph, _LINEARS, x, ws, indices)
            for i, node in enumerate(group):
                node.replace_all_uses_with(lowered_call(graph, getitem, results, i))
        for node in group:
            graph.erase_node(node)
        sort_nodes(graph)
        joined += len(group)
    return joined


def _alike(graph: fx.Graph, order: Order) -> list[fx.Node]:
    """The first products that can be joined, or none."""
    found: dict[Hashable, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        x, w, idx = node.args
        if not environment.shares_launches(node.meta["val"].device.type):
            continue
        weight = w.meta["val"]
        layout = (_sizes(weight), str(tuple(weight.stride())), weight.dtype)
        group = found.setdefault((x, layout, _sizes(idx.meta["val"])), [])
        if not any(waits(node, other, order) or _meet(node, other) for other in group):
            group.append(node)
    return next((group for group in found.values() if len(group) > 1), [])


def _meet(node: fx.Node, other: fx.Node) -> bool:
    """Whether work of their own size reads two results."""
    return bool(_readers(node) & _readers(other))


def _readers(node: fx.Node) -> set[fx.Node]:
    size, found, todo = _sizes(node.meta["val"]), set[fx.Node](), [node]
    while todo:
        for user in todo.pop().users:
            value = user.meta.get("val")
            if user not in found and isinstance(value, Tensor) and _sizes(value) == size:
                found.add(user)
                todo.append(user)
    return found


def _sizes(value: Tensor) -> str:
    """Sizes as text: to compare symbols would add guards."""
    return str(tuple(value.shape))
