"""What tests share: attention nets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.adapted_nets import WIDTH, Adapted

HEADS, KV, DIM = 4, 2, 6


def heads(x: Tensor, dim: int = DIM) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """Projections by name -> output width (inputs in ``reads``, else WIDTH), and a body."""

    def __init__(
        self, widths: dict[str, int], body: Callable[..., Tensor], reads: dict[str, int]
    ) -> None:
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, Adapted(reads.get(name, WIDTH), width))
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def attention(body: Callable[..., Tensor], **widths: int) -> Callable[[], nn.Module]:
    usual = {"q": HEADS * DIM, "k": KV * DIM, "v": KV * DIM, "o": WIDTH}
    reads = {"o": HEADS * DIM}
    return lambda: Block(usual | widths, body, reads)
