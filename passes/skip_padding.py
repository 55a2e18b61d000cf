"""Dense linears of a region leave padding out, as sliced ones do."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import with_stand_in
from sparselora_fx.regions import Rewrite, Site
from sparselora_fx.splitting import logical_weight, placed, shaped, taken_rows


def skip_padding(rewrite: Rewrite) -> int:
    """Compute the frozen linears of regions that stay dense for real tokens alone. Returns the
    linears changed.

    Before:  y: [B, L, N] = linear(x, w, b)
    After:   t: [P, K] = take_tokens(x, r);   y = place_tokens(linear(t, w, b), r)    r: the list of
             tokens that are no padding
    Keeps:   the rows of real tokens. Those of padding become zeros, as in sliced regions: what
             reads a region, attention and what works token by token, lets them reach no loss.
             `sink_takes`, run again, moves the takes past what lies between two linears.
    Skips:   batches without padding; token policies that do not split the tokens; linears in no
             region, whose readers may count or mix all rows (a router, a convolution); those that
             `trim_logits` has left with the rows of one list.
    """
    changed = 0
    for region in rewrite.dense_regions:
        for site in region.sites:
            if site.unpadded is not None and not site.node._erased:
                _skip(rewrite.graph, site)
                changed += 1
    return changed


def _skip(graph: fx.Graph, site: Site) -> None:
    assert site.unpadded is not None
    old, x = site.node, _input(site)
    with graph.inserting_before(old):
        rows = taken_rows(graph, x, site.unpadded)
        weight = logical_weight(graph, site, cast=True)
        dense = graph.call_function(torch.nn.functional.linear, (rows, weight, site.bias))
        with_stand_in(dense, old, rank=2, channels=site.out_features)
        new = placed(graph, dense, site.unpadded, like=old, sizes_of=x)
    old.replace_all_uses_with(shaped(new, old))
    graph.erase_node(old)


def _input(site: Site) -> fx.Node:
    """What the linear reads now: passes may have put another node in the place of ``site.x``."""
    sides = [n for n in site.node.all_input_nodes if n is not site.bias and not _views(n, site)]
    assert len(sides) == 1, sides
    return sides[0]


def _views(node: Any, site: Site) -> bool:
    """Whether a node is the weight, transposed or cast perhaps."""
    while isinstance(node, fx.Node) and node is not site.weight:
        node = node.args[0] if node.args else None
    return node is site.weight
