"""Which calls of a graph wait for which."""

from __future__ import annotations

from torch import fx

Order = dict[fx.Node, int]  # a node's place in its graph


def order_of(graph: fx.Graph) -> Order:
    """The place of each node."""
    return {node: i for i, node in enumerate(graph.nodes)}


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
