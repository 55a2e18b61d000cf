"""Build the score of a region's channels in a graph, as the plan's terms say (`score.TERMS`)."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.analysis.regions import ChannelChoice, Region, RowSelection, Site
from sparselora_fx.ir.ops import OPS
from sparselora_fx.plan.score import Score
from sparselora_fx.rewrite.approximation import Approximation, View
from sparselora_fx.rewrite.replay import Replay
from sparselora_fx.rewrite.rewrite import Options, Rewrite


def lacking(region: Region, options: Options) -> str | None:
    """Why the region cannot be scored as asked, or None."""
    score = options.score
    known = region.consumers if region.kind == "ffn" else region.producers
    term = "prior" if region.kind == "ffn" else "output"
    if score.prior and any(term not in site.statistics for site in known):
        return "calibration did not reach it, so that it has no prior"
    return None


def ffn_scores(region: Region, rewrite: Rewrite) -> fx.Node:
    """Energy of each channel of the region's function, on the rows of the score's view: ``[N]``;
    of several consumers the sum, as if they were one linear with all of their outputs."""
    graph, options = rewrite.graph, rewrite.options
    score = options.score
    total: fx.Node | None = None
    if score.context:
        view = View(graph, region.producers[0], options, pool=True)
        approximate = Approximation(graph, view, options).build
        replay = Replay(graph, rewrite.values, approximate, view.rows)
    for consumer in region.consumers:
        found: fx.Node | None = None
        norms = consumer.statistics.get("norms")
        if score.context:
            found = _energy(graph, replay.build(consumer.x), view, norms, score)
        if score.prior:
            found = _sum(graph, found, consumer.statistics["prior"])
        assert found is not None
        total = _sum(graph, total, _times_square(graph, found, norms) if score.weighted else found)
    assert total is not None
    return total


def head_scores(
    region: Region, choice: ChannelChoice, views: dict[fx.Node | None, View], rewrite: Rewrite
) -> fx.Node:
    """Per kv channel, the product over producers of their norms, a query's averaged over the heads
    that share it; values times the norms of the output projection's columns, if asked.

    ``views`` holds the region's views by what counts in them, so that its choices share rows.
    """
    graph, options = rewrite.graph, rewrite.options
    every = every_channel(graph, choice)
    weights = _column_weights(region, every, graph) if choice.name == "v" else None
    score: fx.Node | None = None
    for pick in (pick for pick in choice.producers if pick.scored):
        rows = channel_rows(graph, every, pick)
        if _is_plain(pick.site, options):
            norms = _plain_norms(graph, pick, rows)
        else:
            counted = pick.site.token_weight
            if counted not in views:
                views[counted] = View(graph, pick.site, options, pool=False)
            energy = _pick_energy(pick, rows, weights, views[counted], options)
            norms = graph.call_method("sqrt", (energy,))
        norms = graph.call_method("view", (norms, len(pick.maps), choice.channels))
        norms = graph.call_method("mean", (norms, 0))
        score = norms if score is None else graph.call_function(torch.mul, (score, norms))
    assert score is not None
    if weights is not None and options.score.weighted:
        score = graph.call_function(torch.mul, (score, weights))
    return score


def every_channel(graph: fx.Graph, choice: ChannelChoice) -> fx.Node:
    """The node of all channel numbers of a choice."""
    device = choice.producers[0].site.weight.meta["example_value"].device
    return graph.call_function(torch.arange, (choice.channels,), {"device": device})


def channel_rows(graph: fx.Graph, channels: fx.Node, pick: RowSelection) -> fx.Node:
    """The node of the rows (or columns) that a pick selects for the given channels."""
    first = pick.maps[0]
    if len(pick.maps) == 1 and first == (1, 1, 0):
        return channels
    args = (channels, first.inner, first.outer_stride, pick.offsets)
    return graph.call_function(OPS.channel_rows.default, args)


def _is_plain(site: Site, options: Options) -> bool:
    """Whether only factors are asked: column norms over all counted tokens, as in the paper."""
    tracked = options.track_adapter and bool(site.adapter_adds)
    return options.score == Score() and not site.statistics and not tracked


def _plain_norms(graph: fx.Graph, pick: RowSelection, rows: fx.Node) -> fx.Node:
    x = graph.call_method("detach", (pick.site.x,))
    args = (x, *pick.site.factors, pick.site.token_weight)
    norms = graph.call_function(OPS.low_rank_norms.default, args)
    return graph.call_method("index_select", (norms, 0, rows))


def _pick_energy(
    pick: RowSelection, rows: fx.Node, weights: fx.Node | None, view: View, options: Options
) -> fx.Node:
    """Mean squares of the rows that a pick selects for every channel: ``[offsets * channels]``."""
    site, score, graph = pick.site, options.score, view.graph

    def chosen(tensor: fx.Node, dim: int = 0) -> fx.Node:
        return graph.call_method("index_select", (tensor, dim, rows))

    found: fx.Node | None = None
    if score.context:
        approximation = Approximation(graph, view, options)
        if approximation.tracked(site):
            hidden = chosen(approximation.build(site), -1)
            found = _energy(graph, hidden, view, weights, score)
        else:
            offset: fx.Node | None = None
            for extra in approximation.extras(site):
                offset = _sum(graph, offset, chosen(extra))
            used = weights if score.normalised else None
            narrow, a = approximation.narrow(site), chosen(site.factors[0])
            args = (narrow, a, offset, view.counted, used, score.normalised)
            found = graph.call_function(OPS.low_rank_energy.default, args)
    if score.prior:
        prior = chosen(site.statistics["output"])
        found = _sum(graph, found, _share(graph, prior, weights) if score.normalised else prior)
    assert found is not None
    return found


def _energy(
    graph: fx.Graph, hidden: fx.Node, view: View, norms: fx.Node | None, score: Score
) -> fx.Node:
    used = norms if score.normalised else None
    args = (hidden, view.counted, used, score.normalised)
    return graph.call_function(OPS.channel_energy.default, args)


def _share(graph: fx.Graph, prior: fx.Node, weights: fx.Node | None) -> fx.Node:
    """Mean squares divided by what they sum to: the scale of normalised energies."""
    whole = prior if weights is None else _times_square(graph, prior, weights)
    total = graph.call_function(torch.sum, (whole,))
    return graph.call_function(torch.div, (prior, total))


def _column_weights(region: Region, every: fx.Node, graph: fx.Graph) -> fx.Node | None:
    """Norm of what the output projections make of each kv value channel: ``[channels]``, over all
    query heads that share it."""
    channels = region.choices[-1].channels
    total: fx.Node | None = None
    for pick in region.consumed:
        norms = pick.site.statistics.get("norms")
        if norms is None:
            return None
        columns = channel_rows(graph, every, pick)
        chosen = graph.call_method("index_select", (norms, 0, columns))
        square = graph.call_method("square", (chosen,))
        grouped = graph.call_method("view", (square, len(pick.maps), channels))
        total = _sum(graph, total, graph.call_method("sum", (grouped, 0)))
    return graph.call_method("sqrt", (total,))


def _sum(graph: fx.Graph, first: fx.Node | None, second: fx.Node) -> fx.Node:
    return second if first is None else graph.call_function(torch.add, (first, second))


def _times_square(graph: fx.Graph, energy: fx.Node, norms: fx.Node | None) -> fx.Node:
    return graph.call_function(torch.mul, (energy, graph.call_method("square", (norms,))))
