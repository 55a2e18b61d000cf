"""One matmul for the LoRA down-projections that read the same input."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import fx

from sparselora_fx.analysis.lora import adapter_weights, is_down_projection
from sparselora_fx.graph.nodes import argument, has_side_effect, op_name
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.ir.ops import LIBRARY
from sparselora_fx.rewrite.rewrite import Rewrite


def join_adapters(rewrite: Rewrite) -> int:
    """Join the down-projections of a rewritten region's LoRA branches. Returns the linears joined.

    Before:  p: [T, r] = linear(x, Aq);  q: [T, r] = linear(x, Ak);  ...     three reads of x
    After:   y: [T, 2r] = linear(x, cat(Aq, Ak));  p = narrow(y, -1, 0, r);  q = narrow(y, -1, r, r)
    Keeps:   every value and gradient, up to the rounding of another blocking. The gradient to x
             becomes one matmul, where several results were added.
    Skips:   branches behind dropouts of their own, which read different inputs; branches with a
             write between them; and graphs that keep some gradient from flowing back, because a
             branch without one (None) would get zeros.
    Source:  horizontal fusion of matmuls that share an operand.
    """
    if rewrite.cuts_gradients:
        return 0
    sites = [site for region in rewrite.regions for site in region.sites]
    weights = adapter_weights(sites)
    order = {node: i for i, node in enumerate(rewrite.graph.nodes)}
    written = [i for node, i in order.items() if _may_write(node)]
    groups: dict[Hashable, list[fx.Node]] = {}
    for node in order:
        if is_down_projection(node, weights):
            start = sum(i < order[node] for i in written)
            groups.setdefault((_source(node.args[0]), start), []).append(node)
    joined = 0
    for group in groups.values():
        if len(group) > 1:
            _join(rewrite.graph, group)
            joined += len(group)
    return joined


def _may_write(node: fx.Node) -> bool:
    ours = getattr(node.target, "namespace", None) == LIBRARY.ns  # unread ones are choices
    return not ours and has_side_effect(node)


def _source(x: fx.Node) -> Hashable:
    """What tells one input from another: the node, or for a cast what it casts to what."""
    if op_name(x) in CASTS and isinstance(x.args[0], fx.Node):
        return (x.args[0], x.op, x.target, tuple(x.args[1:]), tuple(sorted(x.kwargs.items())))
    return x


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    weights = [argument(node, 1, "weight") for node in group]
    with graph.inserting_before(first):
        stacked = graph.call_function(torch.cat, (weights,))
        x = argument(first, 0, "input")
        joint = graph.call_function(torch.nn.functional.linear, (x, stacked))
        start = 0
        for node, weight in zip(group, weights, strict=True):
            width = int(weight.meta["example_value"].shape[0])
            part = graph.call_function(torch.narrow, (joint, -1, start, width))
            node.replace_all_uses_with(part)
            start += width
    for node in group:
        graph.erase_node(node)
