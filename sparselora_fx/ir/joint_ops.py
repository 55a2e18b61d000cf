"""Several sliced matmuls as one op. Lowering makes them of ops that autograd has left behind; no
pass and no user's graph holds one.

Shape letters: T tokens (any leading dims), K input channels, N output channels, S kept channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselora_fx.ir.ops import LIBRARY, sliced_linear, sliced_linear_dgrad

_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define("sliced_linears(Tensor x, Tensor[] w, Tensor[] idx) -> Tensor[]", tags=_TAGS)
LIBRARY.define("sliced_linear_dgrads(Tensor[] gy, Tensor[] w, Tensor[] idx) -> Tensor", tags=_TAGS)


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
