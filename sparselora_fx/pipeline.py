"""Run the passes over a graph and its bodies, and lift what they chose to the graph's outputs.
Knows no pass by name."""

from __future__ import annotations

import itertools
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sparselora_fx.checkpointing import save_selections
from sparselora_fx.fx import bodies, op_name
from sparselora_fx.ops import MARKERS
from sparselora_fx.padding import padding_unread
from sparselora_fx.regions import Observed, Options, Region, Rewrite
from sparselora_fx.token_order import token_inputs, token_orders

log = logging.getLogger(__name__)

Pass = Callable[[Rewrite], int]


@dataclass(frozen=True)
class SiteReport:
    """What became of one frozen weight. ``weight`` is the index of the graph input that holds it.

    ``role`` is "out" (rows kept), "in" (columns kept) or "dense"; ``rows`` is the index among the
    graph's extra outputs.
    """

    weight: int
    role: str
    reason: str = ""
    rows: int | None = None


@dataclass(frozen=True)
class RegionReport:
    """What became of one region: its kind, its sites, and per choice ``name -> (extra output, k,
    N)``."""

    kind: str
    sites: list[SiteReport]
    choices: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class ObservedReport:
    """An input that is observed: the graph inputs that hold the weights reading it, and the extra
    outputs that hold its rows and (if only the graph knows them) their indices."""

    weights: tuple[int, ...]
    kn: tuple[bool | None, ...]  # as `Observed.kn`
    rows: int
    taken: int | None


@dataclass(frozen=True)
class GraphReport:
    """Everything the passes did to one graph. ``extra`` outputs follow the graph's own."""

    regions: list[RegionReport]
    dense: list[SiteReport]
    counts: dict[str, int]
    extra: int
    observed: list[ObservedReport]


@dataclass
class _Lifted:
    """Regions and skips of one graph, in terms of that graph's nodes; ``outputs`` are the nodes to
    return."""

    regions: list[tuple[Region, dict[Any, fx.Node], dict[Any, fx.Node]]] = field(
        default_factory=list
    )
    skips: list[tuple[fx.Node, str]] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)

    def tensors(self) -> list[fx.Node]:
        """All that the graph must return, in a fixed order; some may come twice."""
        chosen = [tensor for _, _, tensors in self.regions for tensor in tensors.values()]
        return chosen + [tensor for seen in self.observed for tensor in seen.tensors]


def run(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    passes: Sequence[Pass],
    arguments: Mapping[str, Tensor],
    frozen: frozenset[int] = frozenset(),
) -> GraphReport | None:
    """Rewrite a Dynamo graph in place. Returns what was done, or None (graph untouched) if no site
    is marked in it. ``arguments``: the tensors of the model's call, by name; ``frozen``: the inputs
    that hold frozen weights, by number."""
    rewrites: dict[fx.GraphModule, Rewrite] = {}
    padding = padding_unread(gm, inputs, arguments, options.shift)
    batch, passed = token_inputs(gm, inputs, arguments)
    orders = token_orders(gm, batch)

    def started(graph: fx.GraphModule, held: frozenset[fx.Node]) -> Rewrite:
        return Rewrite(graph, options, padding, orders, batch, passed, held)

    own = gm.graph.find_nodes(op="placeholder")
    _rewrite_all(gm, passes, rewrites, started, frozenset(own[i] for i in frozen))
    if not rewrites:
        return None
    lifted = _lift(gm, rewrites, {})
    report = _report(gm, lifted, rewrites)
    _finish(gm)
    for body in rewrites:
        _finish(body)
    save_selections(gm)
    return report


def _rewrite_all(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    rewrites: dict[fx.GraphModule, Rewrite],
    started: Callable[[fx.GraphModule, frozenset[fx.Node]], Rewrite],
    frozen: frozenset[fx.Node],
) -> None:
    for _, body, operands in bodies(gm):
        if body not in rewrites:
            held = zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
            inside = frozenset(node for node, given in held if given in frozen)
            _rewrite_all(body, passes, rewrites, started, inside)
    if not any(op_name(node) in MARKERS for node in gm.graph.nodes):
        return
    rewrite = rewrites[gm] = started(gm, frozen)
    for step in passes:
        start = time.perf_counter()
        changes = step(rewrite)
        milliseconds = 1e3 * (time.perf_counter() - start)
        log.info("%s: %d changes in %.1f ms", step.__name__, changes, milliseconds)
        rewrite.counts[step.__name__] = rewrite.counts.get(step.__name__, 0) + changes
        if changes:
            gm.graph.lint()
            log.debug("after %s:\n%s", step.__name__, gm.graph)


def _lift(
    gm: fx.GraphModule,
    rewrites: dict[fx.GraphModule, Rewrite],
    done: dict[fx.GraphModule, _Lifted],
) -> _Lifted:
    """Return a graph's selections and rows from its bodies, so that they are nodes of this
    graph."""
    lifted = done[gm] = _Lifted()
    own = rewrites.get(gm)
    if own is not None:
        for region in own.regions:
            weights = {site: site.weight for site in region.sites}
            tensors: dict[Any, fx.Node] = dict(region.rows)
            for choice in region.choices:
                assert choice.selection is not None
                tensors[choice.name] = choice.selection
            lifted.regions.append((region, weights, tensors))
        lifted.skips += [(skip.weight, skip.reason) for skip in own.skips]
        lifted.observed += own.observed
    for node, body, operands in list(bodies(gm)):
        inner = done[body] if body in done else _lift_body(body, rewrites, done)
        _lift_call(gm, node, body, operands, inner, lifted)
    return lifted


def _lift_body(
    body: fx.GraphModule,
    rewrites: dict[fx.GraphModule, Rewrite],
    done: dict[fx.GraphModule, _Lifted],
) -> _Lifted:
    inner = _lift(body, rewrites, done)
    output = body.graph.output_node()
    own = output.args[0]
    own = tuple(own) if isinstance(own, list | tuple) else (own,)
    body.meta["sparselora_own_outputs"] = len(own)
    output.args = ((*own, *inner.tensors()),)
    return inner


def _lift_call(
    gm: fx.GraphModule,
    call: fx.Node,
    body: fx.GraphModule,
    operands: list[Any],
    inner: _Lifted,
    outer: _Lifted,
) -> None:
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    places = itertools.count(body.meta["sparselora_own_outputs"])
    after = call.next

    def got() -> fx.Node:
        with gm.graph.inserting_before(after):
            return gm.graph.call_function(operator.getitem, (call, next(places)))

    for region, weights, tensors in inner.regions:
        outside = {key: got() for key in tensors}
        outer.regions.append((region, {s: inputs[w] for s, w in weights.items()}, outside))
    for seen in inner.observed:
        reading = tuple(inputs[weight] for weight in seen.weights)
        outer.observed.append(Observed(reading, seen.kn, got(), got() if seen.taken else None))
    outer.skips += [(inputs[weight], reason) for weight, reason in inner.skips]


def _report(
    gm: fx.GraphModule, lifted: _Lifted, rewrites: dict[fx.GraphModule, Rewrite]
) -> GraphReport:
    """Make every selection an output of the top graph and describe it by index."""
    index = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    extra: dict[fx.Node, int] = {}
    for node in lifted.tensors():
        extra.setdefault(node, len(extra))
    regions = []
    for region, weights, tensors in lifted.regions:
        place = {key: extra[node] for key, node in tensors.items()}
        consumer = region.consumer.site
        sites = [
            SiteReport(index[weights[s]], "in" if s is consumer else "out", rows=place[s])
            for s in region.sites
        ]
        choices = {c.name: (place[c.name], c.kept, c.channels) for c in region.choices}
        regions.append(RegionReport(region.kind, sites, choices))
    dense = [SiteReport(index[weight], "dense", reason) for weight, reason in lifted.skips]
    observed = [
        ObservedReport(
            tuple(index[weight] for weight in seen.weights),
            seen.kn,
            extra[seen.rows],
            None if seen.taken is None else extra[seen.taken],
        )
        for seen in lifted.observed
    ]
    output = gm.graph.output_node()
    own = output.args[0]
    assert isinstance(own, list | tuple)
    output.args = ((*own, *extra),)
    counts: dict[str, int] = {}
    for rewrite in rewrites.values():
        for name, changes in rewrite.counts.items():
            counts[name] = counts.get(name, 0) + changes
    return GraphReport(regions, dense, counts, len(extra), observed)


def _finish(gm: fx.GraphModule) -> None:
    gm.graph.lint()
    gm.recompile()
