"""The two kinds of region that `benchmarks.gpu` times, sliced and at full width.

Written with the ops as the passes write them. Weights are frozen; an attention's choice is over kv
channels, as in the product: the query rows of a group follow their kv head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselora_fx.analysis.regions import kept_channels
from sparselora_fx.ir import autograd
from sparselora_fx.ir.ops import OPS

assert autograd.LIBRARY is not None  # importing it registers the derivatives


@dataclass(frozen=True)
class Shape:
    """A model's sizes in channels; ``length`` is the tokens of one sample."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int = 512


MODELS = {
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 64),
    "Llama-3-8B": Shape(4096, 14336, 32, 8, 128),
    "Llama-2-13B": Shape(5120, 13824, 40, 40, 128),
}


@dataclass(frozen=True)
class Region:
    """Both forms of a region as functions of x, and how many channels the sliced one keeps."""

    sliced: Callable[[Tensor], Tensor]
    dense: Callable[[Tensor], Tensor]
    kept: int


def kept(kind: str, shape: Shape, sparsity: float) -> int:
    """Channels that a region of this kind keeps, in multiples of 64."""
    width = shape.ffn if kind == "ffn" else shape.kv_heads * shape.head_dim
    return kept_channels(width, sparsity, 64)


def build(kind: str, shape: Shape, sparsity: float, device: str, dtype: torch.dtype) -> Region:
    """A region of kind "ffn" or "attention" with random weights and a random choice.

    x is ``[B, L, hidden]`` for attention, ``[T, hidden]`` for a feed-forward block.
    """
    count = kept(kind, shape, sparsity)

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device=device, dtype=dtype) / k**0.5

    def choice(n: int) -> Tensor:
        return torch.randperm(n, device=device)[:count].sort().values

    d, width, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if kind == "ffn":
        # channel-major, as compile lays out what is read by column
        weights = [weight(shape.ffn, d), weight(shape.ffn, d), weight(shape.ffn, d).t()]
        idx = choice(shape.ffn)
        return Region(partial(ffn, weights, idx), partial(dense_ffn, weights), count)
    weights = [weight(width, d), weight(kv, d), weight(kv, d), weight(width, d).t()]
    qk, v = choice(kv), choice(kv)
    sliced = partial(attention, weights, qk, v, shape)
    return Region(sliced, partial(dense_attention, weights, shape), count)


def ffn(weights: list[Tensor], idx: Tensor, x: Tensor) -> Tensor:
    """A sliced gated feed-forward region: gate, up ``[I, D]``, down ``[D, I]``."""
    gate, up, down = weights
    hidden = F.silu(OPS.sliced_linear(x, gate, idx)) * OPS.sliced_linear(x, up, idx)
    return OPS.sliced_linear_in(hidden, down, idx)


def dense_ffn(weights: list[Tensor], x: Tensor) -> Tensor:
    """The same at full width."""
    gate, up, down = weights
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def attention(weights: list[Tensor], qk: Tensor, v: Tensor, shape: Shape, x: Tensor) -> Tensor:
    """A sliced causal attention region over ``x[B, L, D]``: q, o of all heads, k, v of kv heads."""
    groups, dim = shape.heads // shape.kv_heads, shape.head_dim

    def of_heads(channels: Tensor) -> Tensor:
        offsets = [g * dim for g in range(groups)]
        return OPS.channel_rows(channels, dim, groups * dim, offsets)

    def full(w: Tensor, rows: Tensor) -> Tensor:
        return OPS.scatter_channels(OPS.sliced_linear(x, w, rows), rows, w.shape[0])

    query, key, value, out = weights
    mixed = _mix(full(query, of_heads(qk)), full(key, qk), full(value, v), shape)
    columns = of_heads(v)
    return OPS.sliced_linear_in(OPS.gather_channels(mixed, columns), out, columns)


def dense_attention(weights: list[Tensor], shape: Shape, x: Tensor) -> Tensor:
    """The same at full width."""
    query, key, value, out = weights
    return F.linear(_mix(F.linear(x, query), F.linear(x, key), F.linear(x, value), shape), out)


def _mix(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """Causal attention of ``[B, L, heads * head_dim]``, back in that shape."""
    query, key, value = (
        part.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for part in (query, key, value)
    )
    grouped = shape.heads != shape.kv_heads
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)
