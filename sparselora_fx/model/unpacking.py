"""What packed weights mean: rows, columns or all of a quantised matrix as floating point values.

Two layouts, named by a `Layout`:

- ``nf4``, ``fp4`` (bitsandbytes): two elements a byte, the first in its high half, row by row; of
  each ``block`` elements in that order one scale, which may itself be quantised (8 bits, blocks of
  256, an offset). ``held = [code f32[16], absmax f32[blocks]]``, or ``[code, absmax u8[blocks],
  nested f32[.], nested code f32[256], offset f32[]]``.
- ``scaled``: one byte an element, ``[N, K]``, and a scale for each tile of it: ``held =
  [scales f32[N / tall, K / block]]``. ``shifted``: each tile has a zero point, too, which is
  taken off first.

Shape letters: N output channels, K input channels, S kept channels. Values are made in float32, as
the quantisers themselves do, and cast once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_KERNEL_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes' own kernel takes
NESTED = 256  # elements of a scale's own block


class Layout(NamedTuple):
    """How a packed matrix ``[n, k]`` is stored. ``block``: elements of a row that share a scale;
    ``tall``: rows that share one."""

    kind: str  # "nf4", "fp4", "scaled" or "shifted"
    n: int
    k: int
    block: int
    tall: int = 1
    by_column: bool = False  # `held` ends with a copy of the packed matrix, column by column

    @property
    def is_tiled(self) -> bool:
        """Whether it stores an element a byte, and a scale for each tile."""
        return self.kind in ("scaled", "shifted")

    def encode(self) -> str:
        """A string that `decode` reads back."""
        return ",".join([self.kind, *(str(int(value)) for value in self[1:])])

    @staticmethod
    @functools.cache
    def decode(text: str) -> Layout:
        """Inverse of `encode`."""
        kind, *sizes, by_column = text.split(",")
        n, k, block, tall = map(int, sizes)
        return Layout(kind, n, k, block, tall, by_column == "1")


def unpack(packed: Tensor, held: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The whole matrix, ``[N, K]``."""
    if layout.is_tiled:
        return _tiled(packed, held, layout, None, None, dtype)
    return _whole(packed, held, layout, dtype)


def unpack_rows(
    packed: Tensor, held: Sequence[Tensor], layout: Layout, idx: Tensor, dtype: torch.dtype
) -> Tensor:
    """``W[idx, :]``, ``[S, K]``: S * K elements are made, and no other."""
    if layout.is_tiled:
        return _tiled(_taken(packed, idx), held, layout, idx, None, dtype)
    scales, n, k = _scales(held), layout.n, layout.k
    part = math.gcd(layout.block, k)  # elements of a row that share a scale, in each row
    starts = idx[:, None] * k + torch.arange(0, k, part, device=idx.device)
    own = scales.index_select(0, (starts // layout.block).reshape(-1))
    if k % 2 == 0 and part in _KERNEL_BLOCKS:
        stored = _bytes(packed).view(n, k // 2).index_select(0, idx)
        return _kernel(stored, own, layout.kind, part, (len(idx), k), dtype)
    places = idx[:, None] * k + torch.arange(k, device=idx.device)
    values = _values(packed, held[0], places).view(len(idx), -1, part) * own.view(len(idx), -1, 1)
    return values.view(len(idx), k).to(dtype)


def unpack_columns(
    packed: Tensor, held: Sequence[Tensor], layout: Layout, idx: Tensor, dtype: torch.dtype
) -> Tensor:
    """``W[:, idx].T``, ``[S, N]``: S * N elements are made, and no other."""
    if layout.is_tiled:
        matrix = held[-1] if layout.by_column else packed.t()
        return _tiled(_taken(matrix, idx).t(), held, layout, None, idx, dtype).t()
    n, k, block = layout.n, layout.k, layout.block
    scales = _scales(held)
    if k % block == 0:
        own = scales.view(n, k // block).t().contiguous().index_select(0, idx // block)
    else:
        own = scales[(idx[:, None] + torch.arange(n, device=idx.device) * k) // block]
    if not layout.by_column:
        places = idx[:, None] + torch.arange(n, device=idx.device) * k
        return (_values(packed, held[0], places) * own).to(dtype)
    stored = held[-1].index_select(0, idx)
    ones = own.new_ones(-(-len(idx) * n // _KERNEL_BLOCKS[0]))
    values = _kernel(stored, ones, layout.kind, _KERNEL_BLOCKS[0], (len(idx), n), torch.float32)
    return values.mul_(own).to(dtype)


def by_column(packed: Tensor, layout: Layout) -> Tensor | None:
    """A copy of a packed matrix from which columns can be taken as `unpack_rows` takes rows: as
    many bytes as the matrix. None where N is odd, and two columns would share a byte."""
    if layout.is_tiled:
        return packed.t().contiguous()
    if layout.n % 2 or layout.k % 2:
        return None
    stored = _bytes(packed).view(layout.n, layout.k // 2)
    high, low = (stored >> 4).t(), (stored & 15).t()  # even columns, odd columns: [K / 2, N]
    turned = torch.stack([high, low], 1).view(layout.k, layout.n)
    return (turned[:, ::2] << 4) | turned[:, 1::2]


def _scales(held: Sequence[Tensor]) -> Tensor:
    """The scale of each block, f32, in the order of the packed elements."""
    absmax = held[1]
    if absmax.dtype != torch.uint8:
        return absmax.float()
    nested, code, offset = held[2:5]
    values = code.index_select(0, absmax.long())
    block = torch.arange(len(absmax), device=absmax.device) // NESTED
    return values * nested.index_select(0, block) + offset


def _bytes(packed: Tensor) -> Tensor:
    """The packed elements, two a byte; they may be stored under another dtype."""
    flat = packed.detach().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _values(packed: Tensor, code: Tensor, places: Tensor) -> Tensor:
    """What the code says of the elements at some places of the matrix, before scaling."""
    pair = _bytes(packed)[places // 2]
    return code[torch.where(places % 2 == 0, pair >> 4, pair & 15).int()]


def _whole(packed: Tensor, held: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    size = layout.n * layout.k
    if size % 2 == 0:  # as one row: the kernel for CPUs reads wrong scales where blocks cross rows
        stored, scales = _bytes(packed), _scales(held)
        values = _kernel(stored, scales, layout.kind, layout.block, (size,), dtype)
        return values.view(layout.n, layout.k)
    rows = torch.arange(layout.n, device=packed.device)
    return unpack_rows(packed, held, layout, rows, dtype)


def _kernel(
    stored: Tensor,
    scales: Tensor,
    kind: str,
    block: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Bytes as values, by bitsandbytes' own kernel. It knows no double: that is cast after."""
    own = torch.float32 if dtype == torch.float64 else dtype
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        stored.reshape(-1, 1), scales, block, kind, shape, own
    )
    return made.to(dtype)


def _taken(matrix: Tensor, idx: Tensor) -> Tensor:
    """Rows of a matrix of bytes, whatever they mean: not every dtype has a gather."""
    return matrix.view(torch.uint8).index_select(0, idx).view(matrix.dtype)


def _tiled(
    values: Tensor,
    held: Sequence[Tensor],
    layout: Layout,
    rows: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Elements with the zero points and scales of their tiles; ``rows`` and ``columns`` are where
    they stand in the matrix, None: all of them in order."""
    made = values.float()
    if layout.kind == "shifted":
        made = made - _of_tiles(held[1], layout, rows, columns)
    return (made * _of_tiles(held[0], layout, rows, columns)).to(dtype)


def _of_tiles(tiles: Tensor, layout: Layout, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """What is kept for each tile, for each element (or for all in a row or column at once)."""
    for axis, chosen, size in ((0, rows, layout.tall), (1, columns, layout.block)):
        if tiles.shape[axis] == 1:
            continue
        if chosen is None and size > 1:
            chosen = torch.arange((layout.n, layout.k)[axis], device=tiles.device)
        if chosen is not None:
            tiles = tiles.index_select(axis, chosen // size)
    return tiles
