"""Layouts of ``cat`` and ``stack``, against the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from sparselora_fx.graph.layout import Atom, ChannelMap, Layout, channel_map
from sparselora_fx.graph.layout_joins import concatenate, stack

START = (2, 12)
WHOLE = Layout.of_linear(START)


def part(start: int, length: int, step: int = 1) -> Layout:
    layout = WHOLE.slice(1, start, length, step)
    assert layout is not None
    return layout


def test_pieces_that_continue_each_other_are_one() -> None:
    joined = concatenate([part(2, 3), part(5, 4), part(9, 1)], 1)
    assert joined is not None and channel_map(joined) == (8, ChannelMap(1, 1, 2))


def test_pieces_alike_and_equally_spaced() -> None:
    """The halves of rotated heads: ``cat(x[..., 0:3], x[..., 6:9])``."""
    joined = concatenate([part(0, 3), part(6, 3)], 1)
    assert joined is not None
    assert joined.dims[1] == (Atom(2, 6), Atom(3, 1))
    mapped = channel_map(joined)
    assert mapped == (6, ChannelMap(3, 6, 0))
    x = torch.arange(12)
    assert mapped[1].rows(6) == torch.cat((x[0:3], x[6:9])).tolist()


def test_a_stack_of_even_and_odd_channels() -> None:
    layouts = [part(0, 6, 2), part(1, 6, 2)]
    stacked = stack(layouts, 2)
    assert stacked is not None
    flat = stacked.reshape(START)
    assert flat is not None and channel_map(flat) == (12, ChannelMap(1, 1, 0))


@pytest.mark.parametrize(
    "pieces",
    [
        [part(0, 3), part(4, 4)],  # of other lengths, with a gap
        [part(0, 3), part(3, 3, 2)],  # other strides
        [part(0, 2), part(2, 2), part(6, 2)],  # not equally spaced
    ],
)
def test_pieces_that_fit_no_map(pieces: list[Layout]) -> None:
    assert concatenate(pieces, 1) is None
    assert stack(pieces, 1) is None


def test_the_same_rows_again_repeat() -> None:
    joined = concatenate([WHOLE, WHOLE], 1)
    assert joined is not None
    assert joined.dims[1] == (Atom(2, 0), Atom(12, 1))
    assert channel_map(joined) is None
