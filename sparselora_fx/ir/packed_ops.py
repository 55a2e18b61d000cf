"""Products with a quantised matrix, of which only what is multiplied is unpacked.

The backward unpacks again: what is unpacked lives as long as one product. Shape letters: T tokens,
K input channels, N output channels, S kept channels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparselora_fx.ir import checks
from sparselora_fx.ir.ops import LIBRARY, OPS
from sparselora_fx.model.unpacking import Layout, unpack, unpack_columns, unpack_rows

ROWS, COLUMNS, ALL = 0, 1, -1  # what of the matrix is multiplied
_TAGS = (torch.Tag.pt2_compliant_tag,)
_MATRIX = "Tensor packed, Tensor[] held, str layout"

LIBRARY.define(f"unpack({_MATRIX}, ScalarType dtype) -> Tensor", tags=_TAGS)
LIBRARY.define(f"packed_linear(Tensor x, {_MATRIX}, Tensor? idx, int of) -> Tensor", tags=_TAGS)
LIBRARY.define(
    f"packed_linear_dgrad(Tensor gy, {_MATRIX}, Tensor? idx, int of) -> Tensor", tags=_TAGS
)


@torch.library.impl(LIBRARY, "unpack", "CompositeExplicitAutograd")
def unpacked(packed: Tensor, held: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    """``W[N, K]``. Only passes see it: between `expand_packed` and `slice_packed` it stands for a
    plain weight, so like one it reads nothing that is multiplied with it."""
    return unpack(packed, held, Layout.decode(layout), dtype)


@torch.library.impl(LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def packed_linear(
    x: Tensor, packed: Tensor, held: list[Tensor], layout: str, idx: Tensor | None, of: int
) -> Tensor:
    """``x @ W.T``, ``x @ W[idx, :].T`` (`ROWS`) or ``x @ W[:, idx].T`` (`COLUMNS`) for a packed
    ``W[N, K]``, with W in x's dtype. Autocast does not change it, as it does not change the
    quantiser's own product.

    Raises (of eager calls): as `sliced_linear` and `sliced_linear_in` do.
    """
    form = Layout.decode(layout)
    _check(x, idx, form, of, inner=form.k)
    if of == COLUMNS:
        assert idx is not None
        return x @ unpack_columns(packed, held, form, idx, x.dtype)
    return x @ _rows(packed, held, form, idx, x.dtype).t()


@torch.library.impl(LIBRARY, "packed_linear_dgrad", "CompositeExplicitAutograd")
def packed_linear_dgrad(
    gy: Tensor, packed: Tensor, held: list[Tensor], layout: str, idx: Tensor | None, of: int
) -> Tensor:
    """The gradient of x: ``gy @ W``, ``gy @ W[idx, :]`` or ``gy @ W[:, idx]``."""
    form = Layout.decode(layout)
    if of == COLUMNS:
        assert idx is not None
        return gy @ unpack_columns(packed, held, form, idx, gy.dtype).t()
    return gy @ _rows(packed, held, form, idx, gy.dtype)


def _rows(
    packed: Tensor, held: list[Tensor], form: Layout, idx: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if idx is None:
        return unpack(packed, held, form, dtype)
    return unpack_rows(packed, held, form, idx, dtype)


def _check(x: Tensor, idx: Tensor | None, form: Layout, of: int, *, inner: int) -> None:
    if idx is not None:
        checks.index(idx, form.k if of == COLUMNS else form.n)
        inner = idx.shape[0] if of == COLUMNS else inner
    if x.shape[-1] != inner:
        raise ValueError(f"x has {x.shape[-1]} channels, but {inner} are multiplied")


@torch.library.register_fake("sparselora::unpack", lib=LIBRARY)
def _(packed: Tensor, held: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    form = Layout.decode(layout)
    return packed.new_empty(form.n, form.k, dtype=dtype)


@torch.library.register_fake("sparselora::packed_linear", lib=LIBRARY)
def _(
    x: Tensor, packed: Tensor, held: list[Tensor], layout: str, idx: Tensor | None, of: int
) -> Tensor:
    form = Layout.decode(layout)
    kept = form.n if idx is None or of == COLUMNS else idx.shape[0]
    return x.new_empty(*x.shape[:-1], kept)


@torch.library.register_fake("sparselora::packed_linear_dgrad", lib=LIBRARY)
def _(
    gy: Tensor, packed: Tensor, held: list[Tensor], layout: str, idx: Tensor | None, of: int
) -> Tensor:
    form = Layout.decode(layout)
    kept = idx.shape[0] if idx is not None and of == COLUMNS else form.k
    return gy.new_empty(*gy.shape[:-1], kept)


class _Ctx(Protocol):
    """What autograd hands from a forward to its backward; PyTorch's own class names none of it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    layout: str
    of: int

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors until the backward."""


_Inputs = tuple[Tensor, Tensor, list[Tensor], str, Tensor | None, int]


def _save(ctx: _Ctx, inputs: _Inputs, output: Tensor) -> None:
    _, packed, held, ctx.layout, idx, ctx.of = inputs
    ctx.save_for_backward(idx, packed, *held)


def _backward(ctx: _Ctx, gy: Tensor) -> tuple[object, ...]:
    idx, packed, *held = ctx.saved_tensors
    gx = None
    if ctx.needs_input_grad[0]:
        gx = OPS.packed_linear_dgrad(gy, packed, held, ctx.layout, idx, ctx.of)
    return gx, None, [None] * len(held), None, None, None


torch.library.register_autograd(
    "sparselora::packed_linear", _backward, setup_context=_save, lib=LIBRARY
)
