"""Masked-dense in plain PyTorch: hooks let a region's linears compute what they do when sliced.

What ``lora_branch="sparse"`` cuts besides, an adapter's own channels, is not cut here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.runtime.runtime import Runtime


def maskable(runtime: Runtime, sites: Iterable[str]) -> bool:
    """Whether each of these linears is a module of its own, which hooks can mask."""
    weights = {weight.name: weight for weight in runtime.frozen}
    return all(name in weights and _is_own(weights[name]) for name in sites)


def _is_own(weight: FrozenWeight) -> bool:
    matrices = [p for p in weight.module._parameters.values() if p is not None and p.dim() == 2]
    return len(matrices) == 1 and not weight.shared


@contextlib.contextmanager
def masked(
    sites: Mapping[str, tuple[str, Tensor]],
    weights: Mapping[str, FrozenWeight],
    sparse: Tensor | None,
) -> Iterator[None]:
    """Let a region's linears compute what they do when sliced: masked-dense, at sparse tokens."""
    handles = []
    for name, (role, rows) in sites.items():
        weight = weights[name]
        if role == "out":
            hook = _producer(weight, rows, sparse)
            handles.append(weight.module.register_forward_hook(hook))
        else:
            handles.append(weight.module.register_forward_pre_hook(_consumer(rows, sparse)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _producer(weight: FrozenWeight, rows: Tensor, sparse: Tensor | None) -> Callable[..., Tensor]:
    """``S_C(W x) + b``: what the skipped channels get is their bias alone."""
    bias = getattr(weight.module, "bias", None)

    def hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        rest = torch.zeros_like(output) if bias is None else bias.to(output).expand_as(output)
        return _mixed(output, _with_rows(output, rest, rows), sparse)

    return hook


def _consumer(rows: Tensor, sparse: Tensor | None) -> Callable[..., object]:
    """``W (S_C h) + b``."""

    def hook(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        x = args[0]
        assert isinstance(x, Tensor)
        return (_mixed(x, _with_rows(x, torch.zeros_like(x), rows), sparse), *args[1:])

    return hook


def _with_rows(kept: Tensor, rest: Tensor, rows: Tensor) -> Tensor:
    mask = torch.zeros(kept.shape[-1], dtype=torch.bool, device=kept.device)
    mask[rows] = True
    return torch.where(mask, kept, rest)


def _mixed(dense: Tensor, masked: Tensor, sparse: Tensor | None) -> Tensor:
    """The masked value at sparse tokens, the dense one elsewhere."""
    if sparse is None or not is_grid(dense, sparse):
        return masked
    return torch.where(sparse[..., None].to(dense.device), masked, dense)


def is_grid(value: object, sparse: Tensor | None) -> bool:
    return isinstance(value, Tensor) and sparse is not None and value.shape[:-1] == sparse.shape
