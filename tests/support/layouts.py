"""Layouts spelled out, one position at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparselora_fx.graph.layout import Atom, Layout


def size_of(dim: tuple[Atom, ...]) -> int:
    return math.prod(int(atom.size) for atom in dim)


def rows_held(layout: Layout) -> Tensor:
    """The row that each position of a layout holds."""
    shape = [size_of(dim) for dim in layout.dims]
    out = torch.empty(shape, dtype=torch.int64)
    for place in itertools.product(*map(range, shape)):
        row = layout.offset
        for dim, at in zip(layout.dims, place, strict=True):
            index = at
            for atom in reversed(dim):
                row += (atom.stride or 0) * (index % int(atom.size))
                index //= int(atom.size)
        out[place] = row
    return out
