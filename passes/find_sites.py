"""Find the frozen linears that were marked, with their LoRA branches."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.regions import UNKNOWN, Site, Skip
from sparselora_fx.analysis.sites import site_of
from sparselora_fx.ir.markers import DENSE
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.packed import matrix_of
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.site_factors import fit_factors
from sparselora_fx.rewrite.site_outputs import complete_site


def find_sites(rewrite: Rewrite) -> int:
    """Turn every site marker into a `Site`, and take the markers out of the graph. Returns the
    sites found.

    Before:  m = site(x, w, a, b, lists, spec);  y = linear(m, w, bias);  l = linear(linear(x, A),
             B);  z = y + l
    After:   y = linear(x, w, bias);             l = linear(linear(x, A), B);  z = y + l      and
             Site(y, x, w, (a, b), ..., z)
    Keeps:   every value bit for bit; where a branch is added in another spelling (``y += l``,
             ``addmm(y, h, B)``: `respell.as_addition`) up to the rounding of its scale.
    Skips:   a weight that is used on two inputs, not as a linear, or that trains.
    Source:  none, this is ours: markers instead of patterns over module names.
    """
    marks = [n for n in rewrite.graph.nodes if n.target is OPS.site.default or n.target is OPS.site]
    by_weight: dict[fx.Node, list[fx.Node]] = {}
    for mark in marks:
        by_weight.setdefault(mark.args[1], []).append(mark)
    carried = {weight: group[0].args for weight, group in by_weight.items()}
    orders = {weight: rewrite.orders[group[0]] for weight, group in by_weight.items()
              if group[0] in rewrite.orders}  # fmt: skip
    for mark in marks:
        mark.replace_all_uses_with(mark.args[0])
        rewrite.graph.erase_node(mark)
    for weight, args in carried.items():
        if weight.op != "placeholder":
            continue  # computed in the graph (a parametrization): no frozen weight any more
        found = site_of(matrix_of(weight), args, len(by_weight[weight]))
        if isinstance(found, Site):
            found.padding_unread = {found.node, *found.more} <= rewrite.padding_unread
            found.order = orders.get(weight, UNKNOWN)
        if args[5] == DENSE:
            rewrite.dense += [] if isinstance(found, Skip) else [found]
        elif isinstance(found, Skip):
            rewrite.skips.append(found)
        else:
            rewrite.sites.append(found)
    for site in rewrite.sites:
        fit_factors(site)
        complete_site(site, rewrite.frozen - {site.weight})
    return len(rewrite.sites)
