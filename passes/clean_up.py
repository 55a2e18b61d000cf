"""Erase what the other passes left unread."""

from __future__ import annotations

from sparselora_fx.rewrite.rewrite import Rewrite


def clean_up(rewrite: Rewrite) -> int:
    """Erase nodes that were read before the passes ran and are not any more. Returns the nodes
    erased.

    Before:  y = linear(h, w);  z = sliced_linear_in(...)    (y replaced by z)
    After:   z = sliced_linear_in(...)
    Keeps:   nodes that nobody read from the start: those are there for what they do (grad mode,
             autocast, random
             draws, prints), which is why `Graph.eliminate_dead_code` is not used. Also selections
             and rows: the runner makes them outputs of the graph.
    Source:  dead code elimination.
    """
    erased = 0
    reported = {choice.selection for region in rewrite.regions for choice in region.choices}
    reported |= {rows for region in rewrite.regions for rows in region.rows.values()}
    keep = rewrite.unread | reported
    for node in reversed(list(rewrite.graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or node in keep:
            continue
        rewrite.graph.erase_node(node)
        erased += 1
    return erased
