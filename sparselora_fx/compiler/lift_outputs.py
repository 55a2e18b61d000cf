"""Lift what passes chose, in a graph and its bodies, to the graph's outputs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import fx

from sparselora_fx.analysis.regions import Observed, Region
from sparselora_fx.compiler.report import GraphReport, ObservedReport, RegionReport, SiteReport
from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.emit import set_value, watch
from sparselora_fx.graph.nodes import value
from sparselora_fx.rewrite.rewrite import Rewrite


@dataclass
class Lifted:
    """Regions and skips of one graph, in terms of that graph's nodes; ``outputs`` are the nodes to
    return."""

    regions: list[tuple[Region, dict[Hashable, fx.Node], dict[Hashable, fx.Node]]] = field(
        default_factory=list
    )
    skips: list[tuple[fx.Node, str]] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)

    def tensors(self) -> list[fx.Node]:
        """All that the graph must return, in a fixed order; some may come twice."""
        chosen = [tensor for _, _, tensors in self.regions for tensor in tensors.values()]
        return chosen + [tensor for seen in self.observed for tensor in seen.tensors]

    def weights(self) -> set[fx.Node]:
        """The inputs that a report names."""
        named = {weight for _, weights, _ in self.regions for weight in weights.values()}
        named |= {weight for weight, _ in self.skips}
        return named | {weight for seen in self.observed for weight in seen.weights}


def lift_outputs(
    gm: fx.GraphModule,
    rewrites: dict[fx.GraphModule, Rewrite],
    done: dict[fx.GraphModule, Lifted],
) -> Lifted:
    """Return a graph's selections and rows from its bodies, so that they are nodes of this
    graph."""
    lifted = done[gm] = Lifted()
    watch(gm)  # a graph without a site of its own is not watched yet
    own = rewrites.get(gm)
    if own is not None:
        for region in own.regions:
            weights: dict[Hashable, fx.Node] = {site: site.weight for site in region.sites}
            tensors: dict[Hashable, fx.Node] = {s: rows for s, rows in region.rows.items()}
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
    done: dict[fx.GraphModule, Lifted],
) -> Lifted:
    inner = lift_outputs(body, rewrites, done)
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
    operands: list[object],
    inner: Lifted,
    outer: Lifted,
) -> None:
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    returned = body.graph.output_node().args[0]
    set_value(call, fx.map_arg(returned, value))
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


def report_of(
    gm: fx.GraphModule,
    lifted: Lifted,
    rewrites: dict[fx.GraphModule, Rewrite],
    inputs: list[int],
) -> GraphReport:
    """Make every selection an output of the top graph and describe it by index. ``inputs``: where
    the graph's inputs were among those of the traced graph."""
    index = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    extra: dict[fx.Node, int] = {}
    for node in lifted.tensors():
        extra.setdefault(node, len(extra))
    regions = []
    for region, weights, tensors in lifted.regions:
        place = {key: extra[node] for key, node in tensors.items()}
        roles = {**dict.fromkeys(region.producers, "out"), **dict.fromkeys(region.consumers, "in")}
        sites = [SiteReport(index[weights[s]], role, rows=place[s]) for s, role in roles.items()]
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
    return GraphReport(regions, dense, counts, len(extra), observed, inputs)
