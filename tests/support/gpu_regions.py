"""Regions written with our ops, as the passes write them, and the check against exact
arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselora_fx.ir import autograd
from sparselora_fx.ir.ops import OPS

assert autograd.LIBRARY is not None  # importing it registers the derivatives

Region = Callable[..., Tensor]


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, idx: Tensor, rest: Tensor) -> Tensor:
    """``x[T, K]``; gate, up ``[N, K]``; down ``[K, N]``; rest ``[T, K]`` stands for residual and
    LoRA."""
    hidden = F.silu(OPS.sliced_linear(x, gate, idx)) * OPS.sliced_linear(x, up, idx)
    return OPS.sliced_linear_in(hidden, down, idx) + rest


HEADS = 2


def attention(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, qk: Tensor, vo: Tensor, rest: Tensor
) -> Tensor:
    """``x[B, L, K]``; q, k, v ``[N, K]``; o ``[K, N]``; ``qk``, ``vo`` are the kept channels; N is
    HEADS heads."""
    width = q.shape[0]

    def heads(w: Tensor, idx: Tensor) -> Tensor:
        full = OPS.scatter_channels(OPS.sliced_linear(x, w, idx), idx, width)
        return full.unflatten(-1, (HEADS, width // HEADS)).transpose(1, 2)

    queries, keys, values = heads(q, qk), heads(k, qk), heads(v, vo)
    scores = queries @ keys.transpose(-1, -2) / (width // HEADS) ** 0.5
    mixed = (torch.softmax(scores, dim=-1) @ values).transpose(1, 2).flatten(2)
    return OPS.sliced_linear_in(OPS.gather_channels(mixed, vo), o, vo) + rest


def kept(channels: int, count: int) -> Tensor:
    """``count`` of ``channels`` channels, ascending, as topk_channels returns them."""
    return torch.randperm(channels)[:count].sort().values


def ffn_inputs(
    lead: tuple[int, ...], k: int, n: int, count: int, dtype: torch.dtype
) -> list[Tensor]:
    """Inputs of `ffn`; x and rest want gradients."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape) / 4).to(dtype)

    x, rest = normal(*lead, k).requires_grad_(), normal(*lead, k).requires_grad_()
    return [x, normal(n, k), normal(n, k), normal(k, n), kept(n, count), rest]


def attention_inputs(
    lead: tuple[int, ...], k: int, n: int, count: int, dtype: torch.dtype
) -> list[Tensor]:
    """Inputs of `attention`; x and rest want gradients."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape) / 4).to(dtype)

    x, rest = normal(*lead, k).requires_grad_(), normal(*lead, k).requires_grad_()
    weights = [normal(n, k), normal(n, k), normal(n, k), normal(k, n)]
    return [x, *weights, kept(n, count), kept(n, count), rest]


def run(fn: Region, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs that want one, for a fixed non-uniform
    cotangent."""
    out = fn(*inputs)
    wanted = [value for value in inputs if value.requires_grad]
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    gradients = torch.autograd.grad(out, wanted, cotangent.to(out))
    return [out.detach(), *gradients]


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    """The same inputs in float64."""
    wide: list[Any] = [v.detach().double() if v.is_floating_point() else v for v in inputs]
    return [w.requires_grad_(v.requires_grad) for w, v in zip(wide, inputs, strict=True)]


def assert_as_exact_as_eager(fn: Region, compiled: Region, inputs: list[Tensor]) -> None:
    """The compiled region's distance from float64 may be twice that of eager, at most."""
    exact = run(fn, doubled(inputs))
    eager, got = run(fn, inputs), run(compiled, inputs)
    for reference, ours, true in zip(eager, got, exact, strict=True):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape
        budget = 2 * distance(reference, true) + torch.finfo(ours.dtype).eps
        assert distance(ours, true) <= budget  # false for NaN


def distance(value: Tensor, true: Tensor) -> float:
    """Relative distance in the Euclidean norm."""
    return float((value.double() - true).norm() / true.norm())
