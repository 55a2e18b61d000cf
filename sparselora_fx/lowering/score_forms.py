"""How the ops that score channels are spelled on a GPU, where a launch costs more than the work."""

from __future__ import annotations

from functools import reduce
from types import NotImplementedType

import torch
from torch import Tensor

from sparselora_fx import environment
from sparselora_fx.ir import ops, score_ops
from sparselora_fx.ir.ops import dtype_of_sums

_MOST_TOKENS, _MOST_RANKS = 128, 16  # of a product that is formed value by value


def low_rank_energy(
    z: Tensor,
    a: Tensor,
    offset: Tensor | None,
    counted: Tensor | None,
    norms: Tensor | None,
    normalise: bool,
) -> Tensor:
    """`score_ops.low_rank_energy`, of few tokens by forming the product ``[T, N]`` after all.

    The Gram matrix needs fewer operations, in two small matmuls, what stands between them, and a
    copy of the factor. Formed value by value, all is one reduction, into which choosing the rows of
    the factor is fused: one launch for five.
    """
    if not (environment.shares_launches(z.device.type) and _few(z, a)):
        return score_ops.low_rank_energy(z, a, offset, counted, norms, normalise)
    wide = dtype_of_sums(z)
    hidden = _product(z.flatten(0, -2).to(wide), a.to(wide))
    if offset is not None:
        hidden = hidden + offset.to(wide)
    return score_ops.channel_energy(hidden, counted, norms, normalise)


def low_rank_linear(z: Tensor, a: Tensor) -> Tensor:
    """`score_ops.low_rank_linear`, of few tokens value by value: no launch of its own."""
    if not (environment.shares_launches(z.device.type) and _few(z, a)):
        return score_ops.low_rank_linear(z, a)
    wide = dtype_of_sums(z)
    return _product(z.to(wide), a.to(wide)).to(z.dtype)


def topk_channels(scores: Tensor, k: int) -> Tensor | NotImplementedType:
    """`ops.topk_channels`; where launches are few, left to a lowering: one kernel for a selection
    and a sort."""
    if environment.shares_launches(scores.device.type):
        return NotImplemented  # type: ignore[no-any-return]
    return ops.topk_channels(scores, k)


def _few(z: Tensor, a: Tensor) -> bool:
    tokens = z.numel() // z.shape[-1] if isinstance(z.numel(), int) else None
    return tokens is not None and 0 < tokens <= _MOST_TOKENS and a.shape[1] <= _MOST_RANKS


def _product(z: Tensor, a: Tensor) -> Tensor:
    """``z a^T`` as a sum over ranks, which a compiler fuses into what reads it."""
    terms = [z[..., r : r + 1] * a[:, r] for r in range(a.shape[1])]
    return reduce(torch.add, terms)
