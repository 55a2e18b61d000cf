"""What the eager ops refuse, and in which words.

Shapes, dtypes and devices are always looked at. The values of an index are looked at on a CPU,
where that costs a sort of k numbers; on a GPU it would wait for the device in every op, so there
it is done only with ``SPARSELORA_DEBUG_BOUNDS=1``. Compiled code does neither: docs/lowering.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselora_fx.environment import check_bounds


def out_sliced(x: Tensor, w: Tensor, idx: Tensor) -> None:
    """Arguments of ``x[T, K] @ w[idx, :].T``; see `matmul` for the errors."""
    matmul(x, w, idx, rows=w.shape[0], inner=w.shape[1])


def out_sliced_dgrad(gy: Tensor, w: Tensor, idx: Tensor) -> None:
    """Arguments of ``gy[T, S] @ w[idx, :]``."""
    matmul(gy, w, idx, rows=w.shape[0], inner=idx.shape[0])


def in_sliced(h: Tensor, w: Tensor, idx: Tensor) -> None:
    """Arguments of ``h[T, S] @ w[:, idx].T``."""
    matmul(h, w, idx, rows=w.shape[1], inner=idx.shape[0])


def in_sliced_dgrad(gy: Tensor, w: Tensor, idx: Tensor) -> None:
    """Arguments of ``gy[T, N] @ w[:, idx]``."""
    matmul(gy, w, idx, rows=w.shape[1], inner=w.shape[0])


def wgrad(gy: Tensor, x: Tensor, idx: Tensor, n: int) -> None:
    """Arguments of a weight gradient: an index into n channels."""
    _same_device(gy, x, idx)
    index(idx, n)


def gather(x: Tensor, idx: Tensor) -> None:
    """Arguments of ``x[..., idx]``."""
    _same_device(x, idx)
    index(idx, x.shape[-1])


def scatter(y: Tensor, idx: Tensor, n: int) -> None:
    """Arguments of the inverse of a gather: as many channels as indices."""
    _same_device(y, idx)
    if y.shape[-1] != idx.shape[0]:
        raise ValueError(f"y holds {y.shape[-1]} channels, but idx names {idx.shape[0]}")
    index(idx, n)


def top(scores: Tensor, k: int) -> None:
    """Raises ValueError unless ``1 <= k <= N`` for ``scores[N]``."""
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k = {k} channels of {scores.shape[-1]}: k must be from 1 to N")


def matmul(x: Tensor, w: Tensor, idx: Tensor, *, rows: int, inner: int) -> None:
    """A sliced matmul ``x[T, inner]`` with an index into ``rows`` of ``w``.

    Raises ValueError for mixed devices or a wrong inner size, TypeError for operands that are not
    floating point, and what `index` raises. x need not be contiguous; w may have another floating
    dtype than x, and is cast.
    """
    _same_device(x, w, idx)
    if not (x.is_floating_point() and w.is_floating_point()):
        raise TypeError(f"x and w must be floating point, got {x.dtype} and {w.dtype}")
    index(idx, rows)
    if x.shape[-1] != inner:
        raise ValueError(f"x has {x.shape[-1]} channels, but {inner} are multiplied")


def index(idx: Tensor, n: int) -> None:
    """A selection of n channels: int64, 1-D, at least one, in range, none twice.

    Raises TypeError, ValueError (shape, no channel, duplicates) or IndexError (range).
    """
    if idx.dtype != torch.int64:
        raise TypeError(f"idx must be int64, got {idx.dtype}; convert it with idx.long()")
    if idx.dim() != 1:
        raise ValueError(f"idx must have one dimension, got shape {tuple(idx.shape)}")
    if idx.shape[0] == 0:
        raise ValueError("idx is empty: a region keeps at least one channel")
    if idx.device.type != "cpu" and not check_bounds():
        return
    ordered = idx.sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= n:
        raise IndexError(f"idx reaches from {low} to {high}, out of range for {n} channels")
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"idx names channel {int(repeated[0])} twice; every channel once at most")


def _same_device(*tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"operands are on {' and '.join(sorted(devices))}; move them to one device"
        )
