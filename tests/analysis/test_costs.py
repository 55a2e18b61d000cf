"""What slicing a region saves and costs, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparselora_fx.analysis import costs
from sparselora_fx.analysis.costs import Rates, estimate, sparse_rows
from sparselora_fx.analysis.regions import ChannelChoice, Region, RowSelection, Site
from sparselora_fx.graph.layout import ChannelMap
from sparselora_fx.ir.markers import MarkedTokens, SiteSpec

SAME = (ChannelMap(1, 1, 0),)


def site(graph: fx.Graph, name: str, tokens: int, rows: int, columns: int, *lists: int) -> Site:
    """A linear ``[rows, columns]`` on so many tokens, with token lists of such lengths."""

    def held(what: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = graph.placeholder(f"{name}_{what}")
        node.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return node

    x, weight = held("x", tokens, columns), held("weight", rows, columns)
    factors = held("a", rows, 4), held("b", 4, columns)
    grid = [held("counted", 1, tokens, dtype=torch.bool)] if lists else []
    for number, length in enumerate(lists):
        grid += [held(f"idx{number}", length), held(f"pos{number}", 1, tokens)]
    spec = SiteSpec(0.5, 0.5)
    return Site(
        weight, x, weight, False, None, factors, MarkedTokens.decode(grid), spec, rows, columns
    )


def ffn(tokens: int, kept: int, *lists: int) -> Region:
    graph = fx.Graph()
    up, down = site(graph, "up", tokens, 40, 8, *lists), site(graph, "down", tokens, 8, 40, *lists)
    choice = ChannelChoice("ffn", 40, kept, [RowSelection(up, SAME)])
    return Region("ffn", [choice], [RowSelection(down, SAME)])


def test_half_of_the_channels_cost_half_of_the_products_and_their_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "_CPU", {torch.float32: Rates(1e6, 1e8, 0.25)})
    found = estimate(ffn(30, 20))
    assert found is not None
    products = 2 * 2 * 2 * 30 * 40 * 8 / 1e6  # two linears, two products, two operations
    copies = 2 * 2 * 2 * 20 * 8 * 4 / 1e8  # twice read and written, four bytes each
    assert found.dense == pytest.approx(products)
    assert found.sliced == pytest.approx(products / 2 + copies + 0.25)
    assert not found.pays


def test_only_the_sparse_list_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_CPU", {torch.float32: Rates(1e6, 1e12, 0.0)})
    whole, split = estimate(ffn(30, 20)), estimate(ffn(30, 20, 12, 18))
    assert whole is not None and split is not None
    assert split.dense == pytest.approx(whole.dense * 12 / 30)
    assert sparse_rows(ffn(30, 20, 12, 18).consumers[0]) == 12


def test_a_dtype_that_was_not_measured_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_CPU", {torch.bfloat16: Rates(1e6, 1e8, 0.0)})
    assert estimate(ffn(30, 20)) is None


@pytest.mark.parametrize("tokens", [4, 4096])
def test_the_measured_rates_of_a_cpu_slice_many_tokens_and_leave_few(tokens: int) -> None:
    found = estimate(ffn(tokens, 20))
    assert found is not None and found.pays is (tokens > 4)
