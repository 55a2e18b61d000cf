"""Who reads a region's channels besides its consumer, and where a layout is lost, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.readers import lost_in, outside_reader, roots_of
from sparselora_fx.analysis.regions import ChannelChoice, Region, RowSelection
from sparselora_fx.graph.layout import ChannelMap
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after


def ffn(also: Callable[[Small, fx.Node, fx.Node], Any]) -> tuple[Rewrite, Region]:
    """``down(silu(up(x)))`` with LoRA on down; ``also`` makes something of up's output and of h."""
    small = Small()
    up = small.site(small.input("x", 2, 3, 8), "up", 16)
    h = small.call(F.silu, up)
    y = small.call(torch.add, small.site(h, "down", 8), small.lora(h, "down", 8))
    rewrite = small.rewrite(y, also(small, up, h))
    after(rewrite, find_sites, find_regions)
    first, second = rewrite.sites
    one = (ChannelMap(1, 1, 0),)
    choice = ChannelChoice("ffn", 16, 8, [RowSelection(first, one)])
    return rewrite, Region("ffn", [choice], [RowSelection(second, one)])


@pytest.mark.parametrize(
    ("also", "reader"),
    [
        (lambda s, up, h: None, None),
        (lambda s, up, h: s.call("size", h, 0), None),
        (lambda s, up, h: up, "the graph's output"),
        (lambda s, up, h: s.linear(h, s.input("v", 4, 16)), "linear (linear_4)"),
        (lambda s, up, h: s.call("sum", h, -1, keepdim=True), "sum (sum_1)"),
    ],
)
def test_readers(also: Any, reader: str | None) -> None:
    rewrite, region = ffn(also)
    assert outside_reader(region, rewrite.values) == reader


def test_where_a_layout_is_lost() -> None:
    rewrite, _ = ffn(lambda s, up, h: s.call("neg", s.call("cumsum", h, -1)))
    end = rewrite.graph.output_node().args[0][1]  # type: ignore[index]
    assert lost_in(end, rewrite.values) == "cumsum (cumsum)"  # type: ignore[arg-type]


def test_roots_of_a_consumer() -> None:
    rewrite, region = ffn(lambda s, up, h: None)
    assert roots_of(region.consumers[0], rewrite.values) == [rewrite.sites[0]]
