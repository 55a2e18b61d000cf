"""Where the channels of a linear's output went: a small algebra of strided layouts.

A tensor that was made from a linear's output by moving data only (view, transpose, slice, chunk,
expand, cat, ...) holds, at each position, one row of that linear's weight. For every layout that
models use, the row is an affine function of the position: ``row = offset + sum(stride_i *
index_i)``. A dimension is a tuple of atoms, outermost first, so that a reshape never loses the
structure (a `repeat_kv` is an atom of stride 0). Token dimensions carry atoms of stride None. This
is the layout idea of CuTe, restricted to what tracing channels needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

from sparselora_fx._torch import size_expression

# The expression of a symbolic size is hashable, and compared without a guard.
Size: TypeAlias = int | sympy.Expr


class Atom(NamedTuple):
    """One factor of a dimension: its size, and how far one step moves in rows (None: a token
    dimension)."""

    size: Size
    stride: int | None


Dim = tuple[Atom, ...]


class ChannelMap(NamedTuple):
    """Rows of channel c: ``(c // inner) * outer_stride + c % inner + offset`` (the arguments of
    `channel_rows`)."""

    inner: int
    outer_stride: int
    offset: int

    def rows(self, channels: int) -> list[int]:
        """The rows of channels 0 to ``channels - 1``."""
        return [
            c // self.inner * self.outer_stride + c % self.inner + self.offset
            for c in range(channels)
        ]


@dataclass(frozen=True)
class Layout:
    """Row index as a function of position: ``offset`` plus each atom's ``stride * index``."""

    offset: int
    dims: tuple[Dim, ...]

    @staticmethod
    def of_linear(shape: Sequence[int | torch.SymInt]) -> Layout:
        """The layout of a fresh linear output ``[..., N]``: row n at channel n."""
        tokens = tuple((Atom(as_size(size), None),) for size in shape[:-1])
        return Layout(0, (*tokens, (Atom(as_size(shape[-1]), 1),)))

    def reshape(self, shape: Sequence[int | torch.SymInt]) -> Layout | None:
        """The layout after a row-major reshape to ``shape``; None if a dimension would mix atoms
        unevenly."""
        atoms = [atom for dim in self.dims for atom in dim if not _equal(atom.size, 1)]
        dims: list[Dim] = []
        for size in reversed(shape):
            dim = _take(atoms, as_size(size))
            if dim is None:
                return None
            dims.append(dim)
        return replace(self, dims=tuple(reversed(dims))) if not atoms else None

    def permute(self, order: Sequence[int]) -> Layout:
        """The layout after ``permute(order)``."""
        return replace(self, dims=tuple(self.dims[axis] for axis in order))

    def slice(
        self, axis: int, start: int, length: int | torch.SymInt | Size, step: int = 1
    ) -> Layout | None:
        """The layout of ``[start : start + step * length : step]`` along one dimension."""
        dim, length = self.dims[axis], as_size(length)
        if len(dim) == 1:
            stride = dim[0].stride
            moved = 0 if stride is None else stride * start
            taken: Dim = (Atom(length, None if stride is None else stride * step),)
        elif not dim:
            return self
        else:
            split = _slice_outer(dim, start, length, step)
            if split is None:
                return None
            moved, taken = split
        dims = (*self.dims[:axis], taken, *self.dims[axis + 1 :])
        return Layout(self.offset + moved, dims)

    def drop(self, axis: int) -> Layout:
        """The layout without one dimension (of size 1, or just sliced to one index)."""
        return replace(self, dims=self.dims[:axis] + self.dims[axis + 1 :])

    def insert(self, axis: int, dim: Dim = ()) -> Layout:
        """The layout with a new dimension at ``axis``."""
        return replace(self, dims=(*self.dims[:axis], dim, *self.dims[axis:]))

    def expand(self, shape: Sequence[int | torch.SymInt]) -> Layout:
        """The layout after ``expand(shape)``: repeated positions are atoms of stride 0."""
        padded = ((),) * (len(shape) - len(self.dims)) + self.dims
        dims = tuple(
            (Atom(size, 0),) if not _equal(size, _size(dim)) else dim
            for dim, size in zip(padded, map(as_size, shape), strict=True)
        )
        return replace(self, dims=dims)

    def repeat_inner(self, axis: int, repeats: int) -> Layout:
        """The layout after ``repeat_interleave(repeats, dim=axis)``."""
        dim = (*self.dims[axis], Atom(repeats, 0))
        return replace(self, dims=(*self.dims[:axis], dim, *self.dims[axis + 1 :]))

    def repeat_outer(self, times: Sequence[int | torch.SymInt]) -> Layout | None:
        """The layout after ``repeat(*times)``."""
        if len(times) < len(self.dims):
            return None
        padded = ((),) * (len(times) - len(self.dims)) + self.dims
        dims = tuple(
            dim if _equal(as_size(n), 1) else (Atom(as_size(n), 0), *dim)
            for dim, n in zip(padded, times, strict=True)
        )
        return replace(self, dims=dims)

    def take(self, axis: int, start: int, atoms: Sequence[Atom]) -> Layout | None:
        """The layout of ``index_select(axis, index)``, where the index is ``start`` plus each
        atom's ``stride * index``."""
        dim = self.dims[axis]
        if len(dim) != 1 or dim[0].stride is None:
            return None
        step = dim[0].stride
        taken = tuple(Atom(a.size, _stride(a) * step) for a in atoms if not _equal(a.size, 1))
        return Layout(
            self.offset + start * step, (*self.dims[:axis], taken, *self.dims[axis + 1 :])
        )

    def channel_atoms(self, axis: int) -> list[Atom]:
        """The atoms of one dimension that move through rows or repeat them; adjacent ones
        merged."""
        return merge_atoms(self.dims[axis])

    def is_token(self, axis: int) -> bool:
        """Whether a dimension holds tokens only (or has size 1)."""
        return all(atom.stride is None or _equal(atom.size, 1) for atom in self.dims[axis])


def channel_map(layout: Layout, axis: int = -1) -> tuple[int, ChannelMap] | None:
    """``(N, map)`` when one dimension alone runs over the rows and the others are tokens, else
    None."""
    axis %= len(layout.dims)
    if not all(layout.is_token(i) for i in range(len(layout.dims)) if i != axis):
        return None
    atoms = layout.channel_atoms(axis)
    sizes = [int(atom.size) for atom in atoms if isinstance(atom.size, int)]
    if len(sizes) != len(atoms) or any(atom.stride in (None, 0) for atom in atoms):
        return None
    if len(atoms) == 1:
        return sizes[0], ChannelMap(1, _stride(atoms[0]), layout.offset)
    if len(atoms) == 2 and atoms[1].stride == 1:
        return sizes[0] * sizes[1], ChannelMap(sizes[1], _stride(atoms[0]), layout.offset)
    return None


def merge_atoms(atoms: Iterable[Atom]) -> list[Atom]:
    """The same index map in as few atoms as possible."""
    merged: list[Atom] = []
    for atom in atoms:
        if _equal(atom.size, 1):
            continue
        if merged and _mergeable(merged[-1], atom):
            merged[-1] = Atom(merged[-1].size * atom.size, atom.stride)
        else:
            merged.append(atom)
    return merged


def split_atoms(atoms: Sequence[Atom], inner: int) -> tuple[Dim, Dim] | None:
    """Atoms as an outer and an inner part, of which the inner one has ``inner`` elements."""
    left = list(atoms)
    taken = _take(left, inner)
    return None if taken is None else (tuple(left), taken)


def _stride(atom: Atom) -> int:
    assert atom.stride is not None
    return atom.stride


def as_size(size: int | torch.SymInt | Size) -> Size:
    """A dimension's size as an integer, or the expression of a symbolic one."""
    if isinstance(size, torch.SymInt):
        size = size_expression(size)
    return int(size) if isinstance(size, sympy.Integer) else size


def same_count(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes hold the same number of elements, whatever their symbolic sizes turn out
    to be."""
    counts = []
    for shape in (a, b):
        total: Size = 1
        for size in shape:
            total = total * as_size(size)
        counts.append(total)
    return _equal(counts[0], counts[1])


def same_shape(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are equal, whatever their symbolic sizes turn out to be. ``a == b`` would
    answer for the sizes of this call, and have each other size compiled anew."""
    return len(a) == len(b) and all(same_count((m,), (n,)) for m, n in zip(a, b, strict=True))


def _equal(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b or sympy.expand(a - b) == 0)


def _size(dim: Dim) -> Size:
    total: Size = 1
    for atom in dim:
        total = total * atom.size
    return total


def _mergeable(outer: Atom, inner: Atom) -> bool:
    if outer.stride is None or inner.stride is None:
        return False
    return _equal(outer.stride, inner.stride * inner.size) and outer.stride != 0


def _take(atoms: list[Atom], size: Size) -> Dim | None:
    """Take atoms from the right of the list until they multiply to ``size``; split the last one if
    need be."""
    taken: list[Atom] = []
    total: Size = 1
    while not _equal(total, size):
        if not atoms:
            return None
        atom = atoms.pop()
        if _equal(total * atom.size, size) or not (
            isinstance(total, int) and isinstance(size, int) and isinstance(atom.size, int)
        ):
            taken.insert(0, atom)
            total = total * atom.size
            continue
        if total * atom.size < size:
            taken.insert(0, atom)
            total = total * atom.size
            continue
        inner, left = divmod(size, total)
        if left or atom.size % inner:
            return None
        taken.insert(0, Atom(inner, atom.stride))
        outer = None if atom.stride is None else atom.stride * inner
        atoms.append(Atom(atom.size // inner, outer))
        total = size
    return tuple(taken)


def _slice_outer(
    dim: Dim, start: int, length: int | torch.SymInt | Size, step: int
) -> tuple[int, Dim] | None:
    """Slice a dimension of several atoms where the cut falls on whole steps of the outermost
    atom."""
    inner = _size(dim[1:])
    if not (isinstance(inner, int) and isinstance(length, int)) or step != 1:
        return None
    if start % inner or length % inner:
        return None
    stride = dim[0].stride
    moved = 0 if stride is None else stride * (start // inner)
    return moved, (Atom(length // inner, stride), *dim[1:])
