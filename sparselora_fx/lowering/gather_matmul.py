"""Gather and matmul through Inductor's own lowerings: what a CPU runs, and what a GPU runs where no
template may.

Shape letters as in `sparselora_fx.ir.ops`. Values are Inductor IR nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sparselora_fx.graph.layout import Size
from sparselora_fx.lowering import inductor
from sparselora_fx.lowering.inductor import Value

_ATEN = torch.ops.aten


def _lowered(op: object) -> Callable[..., Value]:
    found: Callable[..., Value] = inductor.inductor().lowerings[op]
    return found


def _results(op: object) -> Callable[..., Sequence[Value]]:
    found: Callable[..., Sequence[Value]] = inductor.inductor().lowerings[op]
    return found


def rows(w: Value, idx: Value, dtype: torch.dtype) -> Value:
    """``w[idx, :]`` in ``dtype``; the gather comes first, so only kept rows are cast."""
    kept = _lowered(_ATEN.index.Tensor)(w, [idx])
    return _lowered(torch.ops.prims.convert_element_type.default)(kept, dtype)


def transpose(w: Value) -> Value:
    """``w.t()`` of a matrix."""
    return _lowered(_ATEN.permute.default)(w, [1, 0])


def flatten(x: Value) -> Value:
    """``x[..., K]`` as a matrix ``[T, K]``."""
    size = x.get_size()
    return x if len(size) == 2 else _lowered(_ATEN.view.default)(x, [-1, size[-1]])


def unflatten(y: Value, like: Value) -> Value:
    """``y[T, N]`` with the leading dimensions of ``like``."""
    lead = like.get_size()[:-1]
    return y if len(lead) == 1 else _lowered(_ATEN.view.default)(y, [*lead, y.get_size()[1]])


def of_weight(y: Value, i: int, like: Value) -> Value:
    """``y[i]`` of ``y[G, T, N]`` with the leading dimensions of ``like``."""
    return unflatten(_lowered(_ATEN.select.int)(y, 0, i), like)


def add(a: Value, b: Value) -> Value:
    """``a + b``."""
    return _lowered(_ATEN.add.Tensor)(a, b)


def as_row(x: Value) -> Value:
    """``x[N]`` as ``[1, N]``."""
    return _lowered(_ATEN.unsqueeze.default)(x, 0)


def first_row(x: Value) -> Value:
    """``x[0]``."""
    return _lowered(_ATEN.select.int)(x, 0, 0)


def topk_then_sort(scores: Value, k: Size) -> Value:
    """``[R, N] -> int64[R, k]``: of each row the k channels of largest score, ascending."""
    topk, sort = _results(_ATEN.topk.default), _results(_ATEN.sort.default)
    return sort(topk(scores, k, -1, True, False)[1])[0]


def matmul(x: Value, w: Value) -> Value:
    """``x[..., K] @ w[K, N]`` through the 2-D matmul lowering."""
    return unflatten(_lowered(_ATEN.mm.default)(flatten(x), w), x)


def sliced_linear(x: Value, w: Value, idx: Value) -> Value:
    """``x[T, K] @ w[idx, :].T``."""
    return matmul(x, transpose(rows(w, idx, x.get_dtype())))


def sliced_linear_dgrad(gy: Value, w: Value, idx: Value) -> Value:
    """``gy[T, S] @ w[idx, :]``."""
    return matmul(gy, rows(w, idx, gy.get_dtype()))


def sliced_linear_in(h: Value, w: Value, idx: Value) -> Value:
    """``h[T, S] @ w[:, idx].T``."""
    return matmul(h, rows(transpose(w), idx, h.get_dtype()))


def sliced_linear_in_dgrad(gy: Value, w: Value, idx: Value) -> Value:
    """``gy[T, N] @ w[:, idx]``."""
    return matmul(gy, transpose(rows(transpose(w), idx, gy.get_dtype())))


def sliced_linear_wgrad(gy: Value, x: Value, idx: Value, n: Size) -> Value:
    """``gw[N, K]``: rows idx hold ``gy.T @ x``, the others zero."""
    part = _lowered(_ATEN.mm.default)(transpose(flatten(gy)), flatten(x))
    return _placed(part, idx, n)


def sliced_linear_in_wgrad(gy: Value, h: Value, idx: Value, n: Size) -> Value:
    """``gw[N, K=n]``: columns idx hold ``gy.T @ h``, the others zero (built as rows of the
    transpose)."""
    part = _lowered(_ATEN.mm.default)(transpose(flatten(h)), flatten(gy))
    return transpose(_placed(part, idx, n))


def _placed(part: Value, idx: Value, n: Size) -> Value:
    """``zeros[n, K]`` with ``part[S, K]`` in rows idx; idx is unique, so the scatter is
    deterministic."""
    zeros = _lowered(_ATEN.full.default)(
        [n, part.get_size()[1]], 0, dtype=part.get_dtype(), device=part.get_device()
    )
    return _lowered(_ATEN.index_put.default)(zeros, [idx], part, False)


SLICED: dict[str, Callable[..., Value]] = {
    "sliced_linear": sliced_linear,
    "sliced_linear_dgrad": sliced_linear_dgrad,
    "sliced_linear_in": sliced_linear_in,
    "sliced_linear_in_dgrad": sliced_linear_in_dgrad,
}
WEIGHT_GRADIENTS: dict[str, Callable[..., Value]] = {
    "sliced_linear_wgrad": sliced_linear_wgrad,
    "sliced_linear_in_wgrad": sliced_linear_in_wgrad,
}
