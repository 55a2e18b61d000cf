"""Insert, before each region, the nodes that choose its channels."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.regions import Region, Skip
from sparselora_fx.analysis.row_kinds import TokenRows
from sparselora_fx.analysis.scorable import side_inputs
from sparselora_fx.ir.markers import MarkedTokens
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.approximation import View
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.score_subgraph import (
    every_channel,
    ffn_scores,
    head_scores,
    lacking,
)
from sparselora_fx.rewrite.token_counts import count_tokens


def insert_predictor(rewrite: Rewrite) -> int:
    """Give every region's choices a selection node. Returns the selections inserted.

    Before:  g = linear(x, wg);  u = linear(x, wu);  h = silu(g) * u;  y = linear(h, wd)
    After:   p: [B, K] = pool_tokens(x.detach(), mask)
             h~: [B, N] = silu(p bg^T ag^T) * (p bu^T au^T)                     the region's own f,
             on factors
             s: i64[k] = topk_channels(mean_B h~^2, k)
             g = ...                                                            (unchanged)
             for the score "pooled"; others look at other tokens and add more (`score.TERMS`).
    Keeps:   every existing value; nothing inserted needs a gradient (x is detached, factors are
             frozen).
    Skips:   a region whose inputs are computed after its first producer.  Paper: arXiv 2506.16500,
             section 3.
    """
    order = {node: i for i, node in enumerate(rewrite.graph.nodes)}
    inserted = 0
    for region in list(rewrite.regions):
        first = min((site.node for site in region.producers), key=order.__getitem__)
        needs = {node for site in region.producers for node in (site.x, *site.factors)}
        if region.kind == "ffn":
            needs = needs.union(*(side_inputs(c.x, rewrite.values) for c in region.consumers))
        late = any(order[node] > order[first] for node in needs)
        reason = "an input of the region is computed after its first producer" if late else None
        reason = reason or lacking(region, rewrite.options)
        if reason:
            rewrite.regions.remove(region)
            rewrite.skips += [Skip(site.weight, reason) for site in region.sites]
            continue
        with rewrite.graph.inserting_before(first):
            _count_rows(region, rewrite)
            views: dict[fx.Node | None, View] = {}
            for choice in region.choices:
                if choice.whole:
                    choice.selection = every_channel(rewrite.graph, choice)
                    continue
                scores = (
                    ffn_scores(region, rewrite)
                    if region.kind == "ffn"
                    else head_scores(region, choice, views, rewrite)
                )
                choice.selection = rewrite.graph.call_function(
                    OPS.topk_channels.default, (scores, choice.kept)
                )
                inserted += 1
    return inserted


def _count_rows(region: Region, rewrite: Rewrite) -> None:
    """Say which rows that producers see count, where those are not the batch's tokens one by
    one."""
    done: dict[TokenRows, fx.Node] = {}
    for site in region.producers:
        rows, counted = site.token_rows, site.tokens.counted
        if rows is not None and counted is not None:
            if rows not in done:
                done[rows] = count_tokens(rewrite.graph, rows, counted)
            site.tokens = MarkedTokens(done[rows])
