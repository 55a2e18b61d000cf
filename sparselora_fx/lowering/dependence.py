"""Which calls of a graph wait for which, and joining those that do not."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import fx

from sparselora_fx.lowering.inductor import sort_nodes

Order = dict[fx.Node, int]  # a node's place in its graph


def order_of(graph: fx.Graph) -> Order:
    """The place of each node."""
    return {node: i for i, node in enumerate(graph.nodes)}


def join_alike(
    graph: fx.Graph,
    target: Callable[..., object],
    kind: Callable[[fx.Node], Hashable | None],
    results: Callable[[list[fx.Node]], list[fx.Node]],
    *,
    apart: Callable[[fx.Node, fx.Node], bool] = lambda node, other: False,
) -> int:
    """Replace calls of one kind, none of which waits for another, by what computes them at once, as
    long as there are such. Returns the calls replaced.

    Args:
        target: what is called.
        kind: calls of one kind can be joined; None: this one never.
        results: inserts what takes the place of some calls, one node for each.
        apart: whether two calls of one kind stay apart nevertheless.
    """
    joined = 0
    while group := _alike(graph, target, kind, apart):
        with graph.inserting_before(group[-1]):
            for node, result in zip(group, results(group), strict=True):
                node.replace_all_uses_with(result)
        for node in group:
            graph.erase_node(node)
        sort_nodes(graph)
        joined += len(group)
    return joined


def _alike(
    graph: fx.Graph,
    target: Callable[..., object],
    kind: Callable[[fx.Node], Hashable | None],
    apart: Callable[[fx.Node, fx.Node], bool],
) -> list[fx.Node]:
    """The first calls that can be joined, or none. Joining some may make others wait."""
    order = order_of(graph)
    found: dict[Hashable, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=target):
        if (key := kind(node)) is None:
            continue
        group = found.setdefault(key, [])
        if not any(waits(node, other, order) or apart(node, other) for other in group):
            group.append(node)
    return next((group for group in found.values() if len(group) > 1), [])


def waits(node: fx.Node, first: fx.Node, order: Order) -> bool:
    """Whether a node depends on an earlier one."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is first:
                return True
            if source not in seen and order[source] > order[first]:
                seen.add(source)
                todo.append(source)
    return False
