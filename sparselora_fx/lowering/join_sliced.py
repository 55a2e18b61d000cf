"""Sliced matmuls that belong together in one launch, on a GPU."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from operator import getitem

import torch
from torch import Tensor, fx

from sparselora_fx import environment
from sparselora_fx.graph.emit import lowered_call
from sparselora_fx.graph.nodes import operand
from sparselora_fx.ir import joint_ops  # noqa: F401 - defines the ops
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.dependence import join_alike

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
    sums = _join_sums(graph)
    return sums + join_alike(graph, _LINEAR, _kind, partial(_at_once, graph), apart=_meet)


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


def _kind(node: fx.Node) -> Hashable | None:
    """Products of one input by weights that are laid out alike."""
    if not environment.shares_launches(node.meta["val"].device.type):
        return None
    x, w, idx = (operand(node, i) for i in range(3))
    weight = w.meta["val"]
    layout = (_sizes(weight), str(tuple(weight.stride())), weight.dtype)
    return x, layout, _sizes(idx.meta["val"])


def _at_once(graph: fx.Graph, group: list[fx.Node]) -> list[fx.Node]:
    x, ws, indices = group[0].args[0], [n.args[1] for n in group], [n.args[2] for n in group]
    results = lowered_call(graph, _LINEARS, x, ws, indices)
    return [lowered_call(graph, getitem, results, i) for i in range(len(group))]


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
