"""The layout of tensors put together, from those of the pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from sparselora_fx.graph.layout import Atom, Layout


def concatenate(layouts: Sequence[Layout], axis: int) -> Layout | None:
    """The layout of ``cat(tensors, axis)`` when the pieces continue each other's rows, or are
    alike and equally spaced in rows, else None."""
    first = layouts[0]
    stacked = stack(layouts, 0)
    if stacked is not None:
        together = (*stacked.dims[0], *first.dims[axis])
        return replace(first, dims=(*first.dims[:axis], together, *first.dims[axis + 1 :]))
    if len(first.dims[axis]) != 1 or first.dims[axis][0].stride is None:
        return None
    (size, stride) = first.dims[axis][0]
    assert stride is not None
    total = size
    for layout in layouts[1:]:
        same = [d for i, d in enumerate(layout.dims) if i != axis] == [
            d for i, d in enumerate(first.dims) if i != axis
        ]
        piece = layout.dims[axis]
        if not same or len(piece) != 1 or piece[0].stride != stride:
            return None
        if layout.offset != first.offset + stride * int(total):
            return None
        total = total + piece[0].size
    dims = (*first.dims[:axis], (Atom(total, stride),), *first.dims[axis + 1 :])
    return replace(first, dims=dims)


def stack(layouts: Sequence[Layout], axis: int) -> Layout | None:
    """The layout of ``stack(tensors, axis)`` when the pieces are equally spaced in rows, else
    None."""
    first = layouts[0]
    steps = {b.offset - a.offset for a, b in itertools.pairwise(layouts)}
    if len(steps) != 1 or any(layout.dims != first.dims for layout in layouts):
        return None
    return first.insert(axis, (Atom(len(layouts), steps.pop()),))
