"""Let everything that a region's predictor reads come before the region's first producer."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.regions import Region
from sparselora_fx.analysis.scorable import side_inputs
from sparselora_fx.graph.nodes import argument, has_side_effect, op_name
from sparselora_fx.rewrite.rewrite import Rewrite

_RANDOM = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d",
    "dropout2d", "dropout3d", "rrelu", "bernoulli", "multinomial", "normal", "poisson",
    "gumbel_softmax", "scaled_dot_product_attention",
}  # fmt: skip


def sink_producers(rewrite: Rewrite) -> int:
    """Move what depends on a region's producers behind what the others of them read. Returns the
    regions reordered.

    Before:  q = linear(x, wq);  r = rope(q);  z = norm(x);  k = linear(z, wk)
    After:   z = norm(x);  q = linear(x, wq);  r = rope(q);  k = linear(z, wk)
    Keeps:   every value bit for bit, and the order of random draws and of writes: a region is left
             as it is where that would change.
    Source:  code sinking: what others wait for comes first, what nobody waits for moves down.
    """
    changed = 0
    for region in rewrite.regions:
        order = {node: i for i, node in enumerate(rewrite.graph.nodes)}
        first = min((site.node for site in region.producers), key=order.__getitem__)
        needs = {node for site in region.producers for node in (site.x, *site.factors)}
        if region.kind == "ffn":
            needs = needs.union(*(side_inputs(c.x, rewrite.values) for c in region.consumers))
        last = max(needs, key=order.__getitem__)
        if order[last] > order[first]:
            changed += _sink(rewrite, region, first, last)
    return changed


def _sink(rewrite: Rewrite, region: Region, first: fx.Node, last: fx.Node) -> bool:
    """Move the nodes from first on that read producers to after last, in their order."""
    own = {node for site in region.sites for node in (site.node, *site.more)}
    unread = {factor for site in rewrite.sites for factor in site.factors}  # so far
    moved: list[fx.Node] = []
    reading = set(own)
    node = first
    while True:
        if node in own or any(source in reading for source in node.all_input_nodes):
            reading.add(node)
            moved.append(node)
        elif has_side_effect(node) and node not in unread:
            return False
        if node is last:
            break
        node = node.next
    if last in reading or any(has_side_effect(node) or is_random(node) for node in moved):
        return False
    at = last
    for node in moved:
        at.append(node)
        at = node
    return True


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers (an attention does where its dropout is on)."""
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    return name in _RANDOM or name.startswith("rand")
