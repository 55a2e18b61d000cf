"""Dense linears leave padding out, as sliced ones do, where nobody reads its rows."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx._torch import is_erased
from sparselora_fx.analysis.regions import Site
from sparselora_fx.rewrite.gather_motion import token_gather_of
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.token_split import (
    cast_of,
    filled,
    in_shape,
    logical_weight,
    sees_grid,
)


def skip_padding(rewrite: Rewrite) -> int:
    """Compute the frozen linears that stay dense for real tokens alone. Returns the linears
    changed.

    Before:  y: [B, L, N] = linear(x, w, b)
    After:   t: [P, K] = gather_tokens(x, r);   z = linear(t, w, b)    r: the list of real tokens
             y = where(r.pos >= 0, scatter_tokens(z, r), z[0])
    Keeps:   the rows of real tokens, and every gradient. That no other row reaches the loss is
             proven (`sparselora_fx.analysis.padding_proof`). `hoist_token_gathers`, run again,
             moves the gathers past what lies between two linears.
    Skips:   graphs without a sparse region; linears whose padding is read; token policies that do
             not split the tokens; what `hoist_token_gathers` has left with the rows of one list.
    Source:  liveness analysis: rows of padding are dead.
    """
    sliced = {site for region in rewrite.regions for site in region.sites}
    dense = [*rewrite.dense, *(site for site in rewrite.sites if site not in sliced)]
    found = [site for site in dense if site.unpadded and not is_erased(site.node)]
    found = [site for site in found if sees_grid(site, site.unpadded[1])]  # type: ignore[index]
    if not rewrite.regions:
        return 0
    for site in found:
        _skip(rewrite.graph, site)
    return len(found)


def _skip(graph: fx.Graph, site: Site) -> None:
    assert site.unpadded is not None
    old, x = site.node, _input(site)
    with graph.inserting_before(old):
        rows = token_gather_of(graph, x, site.unpadded)
        weight = logical_weight(graph, site, cast_of(site, old, site.x))
        dense = graph.call_function(torch.nn.functional.linear, (rows, weight, site.bias))
        whole = filled(graph, dense, site.unpadded)
        new = in_shape(graph, whole, site.unpadded[1], like=old, sizes_of=x)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _input(site: Site) -> fx.Node:
    """What the linear reads now: passes may have put another node in the place of ``site.x``."""
    sides = [n for n in site.node.all_input_nodes if n is not site.bias and not _views(n, site)]
    assert len(sides) == 1, sides
    return sides[0]


def _views(node: object, site: Site) -> bool:
    """Whether a node is the weight, transposed or cast perhaps."""
    while isinstance(node, fx.Node) and node is not site.weight:
        node = node.args[0] if node.args else None
    return node is site.weight
