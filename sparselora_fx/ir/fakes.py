"""What each op returns when only shapes are known: its rule for tracing.

A rule makes the result and nothing else: whatever it computed on the way could read a symbolic
size, which fixes it, and each other size would be compiled anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparselora_fx.ir import ops
from sparselora_fx.ir.ops import LIBRARY


@torch.library.register_fake("sparselora::sliced_linear", lib=LIBRARY)
def _(x: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    torch._check(x.shape[-1] == w.shape[1])
    return x.new_empty(*x.shape[:-1], idx.shape[0])


@torch.library.register_fake("sparselora::sliced_linear_dgrad", lib=LIBRARY)
def _(gy: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    torch._check(gy.shape[-1] == idx.shape[0])
    return gy.new_empty(*gy.shape[:-1], w.shape[1])


@torch.library.register_fake("sparselora::sliced_linear_wgrad", lib=LIBRARY)
def _(gy: Tensor, x: Tensor, idx: Tensor, n: int) -> Tensor:
    return x.new_empty(n, x.shape[-1])


@torch.library.register_fake("sparselora::sliced_linear_in", lib=LIBRARY)
def _(h: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    torch._check(h.shape[-1] == idx.shape[0])
    return h.new_empty(*h.shape[:-1], w.shape[0])


@torch.library.register_fake("sparselora::sliced_linear_in_dgrad", lib=LIBRARY)
def _(gy: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    torch._check(gy.shape[-1] == w.shape[0])
    return gy.new_empty(*gy.shape[:-1], idx.shape[0])


@torch.library.register_fake("sparselora::sliced_linear_in_wgrad", lib=LIBRARY)
def _(gy: Tensor, h: Tensor, idx: Tensor, n: int) -> Tensor:
    return h.new_empty(gy.shape[-1], n)


@torch.library.register_fake("sparselora::gather_channels", lib=LIBRARY)
def _(x: Tensor, idx: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], idx.shape[0])


@torch.library.register_fake("sparselora::scatter_channels", lib=LIBRARY)
def _(y: Tensor, idx: Tensor, n: int) -> Tensor:
    torch._check(y.shape[-1] == idx.shape[0])
    return y.new_empty(*y.shape[:-1], n)


@torch.library.register_fake("sparselora::gather_or_zero_tokens", lib=LIBRARY)
@torch.library.register_fake("sparselora::gather_tokens", lib=LIBRARY)
def _(x: Tensor, idx: Tensor, pos: Tensor) -> Tensor:
    return x.new_empty(idx.shape[0], x.shape[-1])


@torch.library.register_fake("sparselora::scatter_tokens", lib=LIBRARY)
def _(y: Tensor, idx: Tensor, pos: Tensor) -> Tensor:
    return y.new_empty(*pos.shape, y.shape[1])


@torch.library.register_fake("sparselora::scatter_two_lists", lib=LIBRARY)
def _(y: Tensor, z: Tensor, y_idx: Tensor, y_pos: Tensor, z_idx: Tensor, z_pos: Tensor) -> Tensor:
    return y.new_empty(*y_pos.shape, y.shape[1])


@torch.library.register_fake("sparselora::channel_rows", lib=LIBRARY)
def _(channels: Tensor, inner: int, outer_stride: int, offsets: list[int]) -> Tensor:
    return channels.new_empty(channels.shape[0] * len(offsets))


@torch.library.register_fake("sparselora::topk_channels", lib=LIBRARY)
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(k, dtype=torch.int64)


@torch.library.register_fake("sparselora::pool_tokens", lib=LIBRARY)
def _(x: Tensor, token_weight: Tensor | None) -> Tensor:
    samples = math.prod((x.shape[0], *x.shape[2:-1])) if x.dim() > 2 else 1
    if token_weight is not None and ops.same_tokens(x, token_weight):
        samples = token_weight.shape[0]
    return x.new_empty(samples, x.shape[-1])


@torch.library.register_fake("sparselora::low_rank_norms", lib=LIBRARY)
def _(x: Tensor, a: Tensor, b: Tensor, token_weight: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], dtype=ops.dtype_of_sums(x))


@torch.library.register_fake("sparselora::sample_tokens", lib=LIBRARY)
def _(x: Tensor, counted: Tensor | None, n: int) -> Tensor:
    return x.new_empty(n, x.shape[-1])


@torch.library.register_fake("sparselora::low_rank_linear", lib=LIBRARY)
def _(z: Tensor, a: Tensor) -> Tensor:
    return z.new_empty(*z.shape[:-1], a.shape[0])


@torch.library.register_fake("sparselora::channel_energy", lib=LIBRARY)
def _(h: Tensor, counted: Tensor | None, norms: Tensor | None, normalise: bool) -> Tensor:
    return h.new_empty(h.shape[-1], dtype=ops.dtype_of_sums(h))


@torch.library.register_fake("sparselora::low_rank_energy", lib=LIBRARY)
def _(
    z: Tensor,
    a: Tensor,
    offset: Tensor | None,
    counted: Tensor | None,
    norms: Tensor | None,
    normalise: bool,
) -> Tensor:
    return z.new_empty(a.shape[0], dtype=ops.dtype_of_sums(z))
