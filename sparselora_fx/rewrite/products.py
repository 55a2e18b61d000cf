"""Products with a frozen weight in forms that are no linear over the last dimension, as such."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import fx

from sparselora_fx.analysis.linears import TRANSPOSED, WEIGHT_VIEWS
from sparselora_fx.graph.nodes import argument, op_name, operand, tensor
from sparselora_fx.rewrite.respell import called, drop, instead


def as_linear(node: fx.Node, weights: Set[fx.Node]) -> fx.Node | None:
    """A product with one of some matrices, in the forms that are known.

    tensordot(x, w, 1), bmm(x, w.expand(B, K, N))  ->  matmul(x, w)
    tensordot(x, w, ([2], [1]))                    ->  linear(x, w)
    matmul(w, z)                                   ->  linear(z.mT, w).mT
    """
    if op_name(node) == "tensordot":
        return _from_tensordot(node, weights)
    if op_name(node) not in ("matmul", "mm", "bmm", "__matmul__"):
        return None
    left, right = (argument(node, i, name) for i, name in enumerate(("input", "mat2")))
    matrix, x = tensor(left), tensor(right)
    if matrix is None or x is None:
        return None
    single = _unexpanded(right)
    with node.graph.inserting_before(node):
        if matrix.dim() == 2 and x.dim() > 1 and _origin(left) in weights:
            new = called(torch.nn.functional.linear, called("transpose", right, -1, -2), left)
            return instead(node, torch.transpose, new, -1, -2)
        if x.dim() == matrix.dim() == 3 and single is not None and _origin(single) in weights:
            new = instead(node, torch.matmul, left, single)
            drop(right)
            return new
    return None


def _from_tensordot(node: fx.Node, weights: Set[fx.Node]) -> fx.Node | None:
    x, w, dims = (argument(node, i, name) for i, name in enumerate(("a", "b", "dims")))
    held, matrix = tensor(x), tensor(w)
    if held is None or matrix is None or matrix.dim() != 2 or _origin(w) not in weights:
        return None
    pairs = ([-1], [0]) if dims == 1 else dims
    if not isinstance(pairs, tuple | list) or [len(list(p)) for p in pairs] != [1, 1]:
        return None
    read, summed = int(pairs[0][0]) % held.dim(), int(pairs[1][0]) % 2
    if read != held.dim() - 1:
        return None
    with node.graph.inserting_before(node):
        return instead(node, torch.nn.functional.linear if summed else torch.matmul, x, w)


def _origin(node: object) -> object:
    """What a weight was before it was transposed or cast."""
    while isinstance(node, fx.Node) and (
        op_name(node) in WEIGHT_VIEWS or (op_name(node) == "getattr" and node.args[1] in TRANSPOSED)
    ):
        node = node.args[0]
    return node


def _unexpanded(node: object) -> fx.Node | None:
    """``w`` of ``w[None].expand(B, K, N)``, which holds the same matrix B times."""
    if not isinstance(node, fx.Node) or op_name(node) not in (
        "expand",
        "expand_as",
        "broadcast_to",
    ):
        return None
    inner = operand(node)
    unsqueezed = op_name(inner) == "unsqueeze" and argument(inner, 1, "dim") in (0, -3)
    if unsqueezed or (op_name(inner) == "getitem" and inner.args[1] in (None, (None,))):
        inner = operand(inner)
    example = tensor(inner)
    return inner if example is not None and example.dim() == 2 else None
