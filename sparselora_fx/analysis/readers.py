"""Who reads a region's channels, and where channels are lost."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.channel_values import Channels, Value, Values, sources_of
from sparselora_fx.analysis.regions import Region, Site, Source
from sparselora_fx.graph.nodes import op_name, reads_shape_only


def outside_reader(region: Region, values: Values) -> str | None:
    """Anybody but the consumers who reads a region's channels, in words; None: nobody does.

    Rule:   every user of every node whose value has one of the region's sources as a root must be
            a consumer (with its branch), have such a value itself, or read the shape alone.
    Sound:  roots are never lost but by sizes and writes (`channel_flow`): a user without a value is
            a reader of all channels. The graph's output is a user like any other.
    """
    inside: set[Source] = {*region.producers}
    if region.attention is not None:
        inside.add(region.attention)
    allowed: set[fx.Node] = set()
    for consumer in region.consumers:
        allowed |= consumer.adapter_nodes | {consumer.node, *consumer.more}
    for node, value in values.items():
        if not inside & sources_of(value) or node in allowed:
            continue
        for user in node.users:
            if user in allowed or reads_shape_only(user, node):
                continue
            if _inside(values.get(user), inside):
                continue
            return _describe(_reader(node, user, values, inside))
    return None


def roots_of(consumer: Site, values: Values) -> list[Site]:
    return [s for s in sources_of(values.get(consumer.x)) if isinstance(s, Site)]


def lost_in(node: fx.Node, values: Values) -> str:
    """The first call behind which a value that is made of channels has no layout any more, in
    words."""
    while True:
        unknown = [n for n in node.all_input_nodes if _is_unknown(values.get(n))]
        if not unknown:
            return _describe(node)
        node = unknown[0]


def _is_unknown(value: Value | None) -> bool:
    return isinstance(value, Channels) and all(port.layout is None for port in value.ports)


def _reader(node: fx.Node, user: fx.Node, values: Values, inside: set[Source]) -> fx.Node:
    """The call that reads a region's channels, where what is made of them is read by ``user``."""

    def holds(node: fx.Node) -> bool:
        value = values[node]
        return not isinstance(value, Channels) or any(p.source in inside for p in value.ports)

    while not holds(node):
        before = [n for n in node.all_input_nodes if _inside(values.get(n), inside)]
        node, user = next(filter(holds, before), before[0]), node
    return user


def _inside(value: Value | None, inside: set[Source]) -> bool:
    return bool(inside & sources_of(value))


def _describe(node: fx.Node) -> str:
    return "the graph's output" if node.op == "output" else f"{op_name(node)} ({node.name})"
