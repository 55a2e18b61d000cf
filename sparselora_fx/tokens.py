"""Count tokens, eagerly, outside the compiled region: which tokens of a batch are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def call_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, as far as the signature of ``forward`` names them."""
    names = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def token_weight(arguments: Mapping[str, Any]) -> Tensor | None:
    """``bool[B, L]``: true for tokens that count, false for padding; None when a call has no token grid.

    Read from ``attention_mask`` (2-D), else all true on the grid of ``input_ids`` or ``inputs_embeds``. A mask of
    another rank says nothing about single tokens: then every token counts.
    """
    grid = arguments.get("input_ids")
    if not isinstance(grid, Tensor):
        embeds = arguments.get("inputs_embeds")
        grid = embeds[..., 0] if isinstance(embeds, Tensor) else None
    if grid is None or grid.dim() != 2:
        return None
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == grid.shape:
        return mask.to(device=grid.device, dtype=torch.bool)
    return torch.ones(grid.shape, dtype=torch.bool, device=grid.device)
