"""Insert, before each region, the nodes that choose its channels."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.ops import OPS
from sparselora_fx.regions import Choice, Region, Rewrite, RowPick, Site, Skip
from sparselora_fx.scoring import Replay, side_inputs


def insert_predictor(rewrite: Rewrite) -> int:
    """Give every region's choices a selection node. Returns the selections inserted.

    Before:  g = linear(x, wg);  u = linear(x, wu);  h = silu(g) * u;  y = linear(h, wd)
    After:   p: [B, K] = pool_tokens(x.detach(), mask)
             h~: [B, N] = silu(p bg^T ag^T) * (p bu^T au^T)                     the region's own f,
             on factors
             s: i64[k] = topk_channels(sum_B h~^2, k)
             g = ...                                                            (unchanged)
    Keeps:   every existing value; nothing inserted needs a gradient (x is detached, factors are
             frozen).
    Skips:   a region whose inputs are computed after its first producer.  Paper: arXiv 2506.16500,
             section 3.
    """
    order = {node: i for i, node in enumerate(rewrite.graph.nodes)}
    inserted = 0
    for region in list(rewrite.regions):
        first = min((site.node for site in _producers(region)), key=order.__getitem__)
        needs = {node for site in _producers(region) for node in (site.x, *site.factors)}
        if region.kind == "ffn":
            needs |= side_inputs(region.consumer.site.x, rewrite.values)
        if any(order[node] > order[first] for node in needs):
            rewrite.regions.remove(region)
            reason = "an input of the region is computed after its first producer"
            rewrite.skips += [Skip(site.weight, reason) for site in region.sites]
            continue
        with rewrite.graph.inserting_before(first):
            for choice in region.choices:
                if choice.whole:
                    choice.selection = _every_channel(rewrite.graph, choice)
                    continue
                scores = (
                    _ffn_scores(region, rewrite)
                    if region.kind == "ffn"
                    else _head_scores(region, choice, rewrite)
                )
                choice.selection = rewrite.graph.call_function(
                    OPS.topk_channels.default, (scores, choice.kept)
                )
                inserted += 1
    return inserted


def _producers(region: Region) -> list[Site]:
    return list(dict.fromkeys(pick.site for choice in region.choices for pick in choice.producers))


def _ffn_scores(region: Region, rewrite: Rewrite) -> fx.Node:
    """Squared column norms of the region's function over samples: ``[B, N] -> [N]`` (the root does
    not change the order)."""
    graph = rewrite.graph
    pooled: dict[fx.Node, fx.Node] = {}
    mask = _producers(region)[0].token_weight

    def approximate(site: Site) -> fx.Node:
        if site.x not in pooled:
            x = graph.call_method("detach", (site.x,))
            pooled[site.x] = graph.call_function(OPS.pool_tokens.default, (x, site.token_weight))
        a, b = site.factors
        narrow = graph.call_function(torch.nn.functional.linear, (pooled[site.x], b))
        return graph.call_function(torch.nn.functional.linear, (narrow, a))

    hidden = Replay(graph, rewrite.values, approximate, mask).build(region.consumer.site.x)
    squared = graph.call_function(torch.square, (hidden,))
    return graph.call_function(torch.sum, (squared, 0))


def _head_scores(region: Region, choice: Choice, rewrite: Rewrite) -> fx.Node:
    """Per kv channel, the product over producers of their column norms, a query's averaged over
    the heads that share it."""
    graph = rewrite.graph
    every = _every_channel(graph, choice)
    score: fx.Node | None = None
    for pick in (pick for pick in choice.producers if pick.scored):
        x = graph.call_method("detach", (pick.site.x,))
        norms = graph.call_function(
            OPS.low_rank_norms.default, (x, *pick.site.factors, pick.site.token_weight)
        )
        rows = channel_rows(graph, every, pick)
        norms = graph.call_method("index_select", (norms, 0, rows))
        norms = graph.call_method("view", (norms, len(pick.maps), choice.channels))
        norms = graph.call_method("mean", (norms, 0))
        score = norms if score is None else graph.call_function(torch.mul, (score, norms))
    assert score is not None
    return score


def _every_channel(graph: fx.Graph, choice: Choice) -> fx.Node:
    return graph.call_function(torch.arange, (choice.channels,), {"device": _device(choice)})


def channel_rows(graph: fx.Graph, channels: fx.Node, pick: RowPick) -> fx.Node:
    """The node of the rows (or columns) that a pick selects for the given channels."""
    first = pick.maps[0]
    if len(pick.maps) == 1 and first == (1, 1, 0):
        return channels
    args = (channels, first.inner, first.outer_stride, pick.offsets)
    return graph.call_function(OPS.channel_rows.default, args)


def _device(choice: Choice) -> torch.device:
    device = choice.producers[0].site.weight.meta["example_value"].device
    assert isinstance(device, torch.device)
    return device
