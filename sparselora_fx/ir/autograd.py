"""Derivatives and autocast rules of the ops: exact, and never saving an activation that only a
frozen weight would need."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparselora_fx._torch import without_autocast
from sparselora_fx.ir import fakes  # noqa: F401 - importing fakes registers shapes
from sparselora_fx.ir.ops import LIBRARY, OPS


class Ctx(Protocol):
    """What autograd hands from a forward to its backward; PyTorch's own class names none of it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    channels: int  # of a gather's input
    shape: torch.Size  # of a gather's input

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors until the backward."""


def _save(ctx: Ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, w, idx = inputs
    ctx.save_for_backward(x if w.requires_grad else None, w, idx)


def _backward_out(ctx: Ctx, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, idx = ctx.saved_tensors
    gx = OPS.sliced_linear_dgrad(gy, w, idx) if ctx.needs_input_grad[0] else None
    gw = None
    if ctx.needs_input_grad[1]:
        gw = OPS.sliced_linear_wgrad(gy, x, idx, w.shape[0]).to(w.dtype)
    return gx, gw, None


def _backward_in(ctx: Ctx, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    h, w, idx = ctx.saved_tensors
    gh = OPS.sliced_linear_in_dgrad(gy, w, idx) if ctx.needs_input_grad[0] else None
    gw = None
    if ctx.needs_input_grad[1]:
        gw = OPS.sliced_linear_in_wgrad(gy, h, idx, w.shape[1]).to(w.dtype)
    return gh, gw, None


torch.library.register_autograd(
    "sparselora::sliced_linear", _backward_out, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "sparselora::sliced_linear_in", _backward_in, setup_context=_save, lib=LIBRARY
)


def _save_gather(ctx: Ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, idx = inputs
    ctx.channels = x.shape[-1]
    ctx.save_for_backward(idx)


def _backward_gather(ctx: Ctx, gy: Tensor) -> tuple[Tensor, None]:
    (idx,) = ctx.saved_tensors
    return OPS.scatter_channels(gy, idx, ctx.channels), None


def _save_scatter(ctx: Ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_scatter(ctx: Ctx, gx: Tensor) -> tuple[Tensor, None, None]:
    (idx,) = ctx.saved_tensors
    return OPS.gather_channels(gx, idx), None, None


torch.library.register_autograd(
    "sparselora::gather_channels", _backward_gather, setup_context=_save_gather, lib=LIBRARY
)
torch.library.register_autograd(
    "sparselora::scatter_channels", _backward_scatter, setup_context=_save_scatter, lib=LIBRARY
)


def _save_gather_tokens(ctx: Ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(*inputs[1:])


def _backward_gather_tokens(ctx: Ctx, gy: Tensor) -> tuple[Tensor, None, None]:
    return OPS.scatter_tokens(gy, *ctx.saved_tensors).view(ctx.shape), None, None


def _save_scatter_tokens(ctx: Ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_scatter_tokens(ctx: Ctx, gx: Tensor) -> tuple[Tensor, None, None]:
    return OPS.gather_or_zero_tokens(gx, *ctx.saved_tensors), None, None


def _save_scatter_two_lists(ctx: Ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward_scatter_two_lists(ctx: Ctx, gx: Tensor) -> tuple[Tensor | None, ...]:
    y_idx, y_pos, z_idx, z_pos = ctx.saved_tensors
    gy = OPS.gather_or_zero_tokens(gx, y_idx, y_pos)
    gz = OPS.gather_or_zero_tokens(gx, z_idx, z_pos)
    return gy, gz, None, None, None, None


for _name, _setup, _backward in (
    ("gather_tokens", _save_gather_tokens, _backward_gather_tokens),
    ("gather_or_zero_tokens", _save_gather_tokens, _backward_gather_tokens),
    ("scatter_tokens", _save_scatter_tokens, _backward_scatter_tokens),
    ("scatter_two_lists", _save_scatter_two_lists, _backward_scatter_two_lists),
):
    torch.library.register_autograd(
        f"sparselora::{_name}", _backward, setup_context=_setup, lib=LIBRARY
    )


def _autocast(name: str, device: str) -> None:
    """Under autocast a sliced linear computes in the autocast dtype, as F.linear does; w is cast
    after its gather."""
    op = getattr(OPS, name).default

    def cast(x: Tensor, w: Tensor, idx: Tensor) -> Tensor:
        with without_autocast(device):
            x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
            result: Tensor = op(x, w, idx)
            return result

    torch.library.impl(LIBRARY, name, f"Autocast{device.upper()}")(cast)


for _device in ("cpu", "cuda"):
    _autocast("sliced_linear", _device)
    _autocast("sliced_linear_in", _device)
