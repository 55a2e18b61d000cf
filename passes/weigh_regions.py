"""Leave regions dense whose slicing costs more than it saves."""

from __future__ import annotations

from sparselora_fx.analysis.costs import estimate
from sparselora_fx.analysis.reasons import UNPROFITABLE
from sparselora_fx.analysis.regions import Skip
from sparselora_fx.rewrite.rewrite import Rewrite


def weigh_regions(rewrite: Rewrite) -> int:
    """Estimate each region, and take out those that cannot pay. Returns how many; the graph is
    unchanged.

    Keeps:  every region where speed is not asked for (``Options.weigh``), and on a device that was
            not measured.
    Skips:  a region whose sliced products, copies and launches take longer than its dense products
            at this batch's number of sparse tokens. Its reason carries the figures.
    """
    if not rewrite.options.weigh:
        return 0
    left = []
    for region in rewrite.regions:
        found = estimate(region)
        if found is not None and not found.pays:
            left.append(region)
            text = f"{UNPROFITABLE}: {_us(found.sliced)} against {_us(found.dense)} dense"
            rewrite.skips += [Skip(site.weight, text) for site in region.sites]
    rewrite.regions = [region for region in rewrite.regions if region not in left]
    return len(left)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us"
