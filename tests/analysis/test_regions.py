"""The vocabulary of sites and regions: how many channels are kept, which token lists a site reads,
which rows a head's channels are."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from sparselora_fx.analysis.regions import (
    ChannelChoice,
    Heads,
    Region,
    RowSelection,
    Site,
    is_trainable,
    kept_channels,
)
from sparselora_fx.graph.layout import Atom, ChannelMap
from sparselora_fx.ir.markers import MarkedTokens, SiteSpec
from tests.support.small_graphs import Small


def site_of(tokens: int = 0, *, padding_unread: bool = False) -> Site:
    small = Small()
    x, w = small.input("x", 2, 3, 8), small.input("w", 16, 8)
    lists = tuple(small.input(f"t{i}", 2, 3) for i in range(tokens))
    y = small.linear(x, w)
    spec = SiteSpec(0.5, 0.5)
    return Site(
        y,
        x,
        w,
        False,
        None,
        (w, w),
        MarkedTokens.decode(lists),
        spec,
        16,
        8,
        padding_unread=padding_unread,
    )


@pytest.mark.parametrize(
    ("channels", "sparsity", "multiple", "kept"),
    [
        (16, 0.5, 1, 8),
        (10, 0.75, 1, 2),  # floor(2.5)
        (3, 0.99, 1, 1),  # one at least
        (100, 0.9, 16, 16),  # rounded up
        (20, 0.1, 16, 20),  # never more than there are
        (10, 0.7, 1, 3),  # 10 * (1 - 0.7) is 3.0000000000000004 in floating point
        (10, 0.9, 1, 1),  # 10 * (1 - 0.9) is 0.9999999999999998
    ],
)
def test_kept_channels(channels: int, sparsity: float, multiple: int, kept: int) -> None:
    assert kept_channels(channels, sparsity, multiple) == kept


def numbers(lists: Any) -> Any:
    return [int(n.name[1:]) for part in lists for n in part]


def test_token_lists_of_a_site() -> None:
    """Padding counts as dense, unless nobody reads it: then it is in no list."""
    assert site_of().token_weight is site_of().split is site_of().unpadded is None
    assert site_of(1).token_weight is not None and site_of(1).split is None
    assert numbers(site_of(5).split) == [1, 2, 3, 4]
    assert numbers(site_of(9).split) == [1, 2, 7, 8]
    unread = site_of(9, padding_unread=True)
    assert numbers(unread.split) == [1, 2, 3, 4]
    assert unread.unpadded is not None and numbers([unread.unpadded]) == [5, 6]
    assert site_of(9).unpadded is None


def test_rows_of_heads_that_share_a_key_head() -> None:
    """Four query heads of 3 channels for two key heads: side by side, or every other one."""
    site = site_of()
    heads = Heads(site, 0, (Atom(4, 3),), 3)
    assert heads.number == 4
    assert heads.maps(2, True) == (ChannelMap(3, 6, 0), ChannelMap(3, 6, 3))
    assert heads.maps(2, False) == (ChannelMap(3, 3, 0), ChannelMap(3, 3, 6))
    assert heads.maps(4, True) == (ChannelMap(3, 3, 0),)
    for inner in (True, False):
        maps = heads.maps(2, inner)
        assert maps is not None
        assert sorted(row for m in maps for row in m.rows(6)) == list(range(12))


def test_rows_of_a_part_of_fused_heads() -> None:
    """Keys among ``[2 heads, (q, k, v), 3]``."""
    heads = Heads(site_of(), 3, (Atom(2, 9),), 3)
    assert heads.maps(2, True) == (ChannelMap(3, 9, 3),)


def test_heads_that_cannot_be_shared_evenly() -> None:
    assert Heads(site_of(), 0, (Atom(4, 3),), 3).maps(3, False) is None


def test_a_region_names_each_site_once() -> None:
    producer, consumer = site_of(), site_of()
    one = ChannelMap(1, 1, 0)
    picks = [RowSelection(producer, (one,)), RowSelection(producer, (one,))]
    region = Region("ffn", [ChannelChoice("ffn", 16, 8, picks)], [RowSelection(consumer, (one,))])
    assert region.sites == [producer, consumer]
    assert RowSelection(producer, (one, ChannelMap(1, 1, 4))).offsets == [0, 4]


def test_what_trains_is_an_input() -> None:
    small = Small()
    trained: fx.Node = small.input("a", 2, 2, trains=True)
    assert is_trainable(trained)
    assert not is_trainable(small.input("b", 2, 2))
    assert not is_trainable(small.call("neg", trained))
