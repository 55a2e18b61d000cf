"""Several sliced matmuls, or several choices of channels, as one op. Lowering makes them of ops
that autograd has left behind; no pass and no user's graph holds one.

Shape letters: T tokens (any leading dims), K input channels, N output channels, S kept channels, R
choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselora_fx.ir.ops import LIBRARY, sliced_linear, sliced_linear_dgrad, topk_channels

_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define("sliced_linears(Tensor x, Tensor[] w, Tensor[] idx) -> Tensor[]", tags=_TAGS)
LIBRARY.define("sliced_linear_dgrads(Tensor[] gy, Tensor[] w, Tensor[] idx) -> Tensor", tags=_TAGS)
LIBRARY.define("topk_rows(Tensor scores, int k) -> Tensor", tags=_TAGS)


@torch.library.impl(LIBRARY, "sliced_linears", "CompositeExplicitAutograd")
def sliced_linears(x: Tensor, w: list[Tensor], idx: list[Tensor]) -> list[Tensor]:
    """`sliced_linear` of one ``x[T, K]`` with each of several weights ``[N, K]``."""
    return [sliced_linear(x, *given) for given in zip(w, idx, strict=True)]


@torch.library.impl(LIBRARY, "sliced_linear_dgrads", "CompositeExplicitAutograd")
def sliced_linear_dgrads(gy: list[Tensor], w: list[Tensor], idx: list[Tensor]) -> Tensor:
    """The sum of `sliced_linear_dgrad` of several ``gy[T, S]``: the gradient of what several sliced
    matmuls read."""
    first, *others = zip(gy, w, idx, strict=True)
    total = sliced_linear_dgrad(*first)
    for given in others:
        total = total + sliced_linear_dgrad(*given)
    return total


@torch.library.register_fake("sparselora::sliced_linears", lib=LIBRARY)
def _(x: Tensor, w: list[Tensor], idx: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], i.shape[0]) for i in idx]


@torch.library.register_fake("sparselora::sliced_linear_dgrads", lib=LIBRARY)
def _(gy: list[Tensor], w: list[Tensor], idx: list[Tensor]) -> Tensor:
    return gy[0].new_empty(*gy[0].shape[:-1], w[0].shape[1])


@torch.library.impl(LIBRARY, "topk_rows", "CompositeExplicitAutograd")
def topk_rows(scores: Tensor, k: int) -> Tensor:
    """`topk_channels` of each row: ``[R, N] -> int64[R, k]``."""
    return torch.stack([topk_channels(row, k) for row in scores])


@torch.library.register_fake("sparselora::topk_rows", lib=LIBRARY)
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)
