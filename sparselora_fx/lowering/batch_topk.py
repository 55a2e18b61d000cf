"""Independent choices of channels in one launch, on a GPU."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import fx

from sparselora_fx import environment
from sparselora_fx.graph.emit import lowered_call
from sparselora_fx.ir import joint_ops  # noqa: F401 - defines `topk_rows`
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.dependence import order_of, waits
from sparselora_fx.lowering.inductor import sort_nodes

_TOPK = OPS.topk_channels.default


def batch_topk(graph: fx.Graph) -> int:
    """Join top-k selections of equally many from equally many scores, where none waits for another:
    of attention's queries and keys, and of its values. Returns the selections joined.

    Before:  i = topk_channels(s: [N], k);  j = topk_channels(t: [N], k)
    After:   m = topk_rows(stack(s, t), k);  i = m[0];  j = m[1]

    A post-grad pass of Inductor: nodes are those of aten.
    """
    joined = 0
    while group := _alike(graph):
        _join(graph, group)
        sort_nodes(graph)
        joined += len(group)
    return joined


def _alike(graph: fx.Graph) -> list[fx.Node]:
    """The first selections that can be joined, or none. Joining some may make others wait."""
    order = order_of(graph)
    found: dict[Hashable, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_TOPK):
        value = node.args[0].meta["val"]
        if not environment.shares_launches(value.device.type):
            continue
        key = (value.shape[0], value.dtype, *node.args[1:])
        group = found.get(key, [])
        if any(waits(node, earlier, order) for earlier in group):
            if len(group) > 1:
                return group
            group = []
        found[key] = [*group, node]
    return next((group for group in found.values() if len(group) > 1), [])


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    scores = [node.args[0] for node in group]
    with graph.inserting_before(group[-1]):
        rows = [lowered_call(graph, torch.ops.aten.unsqueeze.default, score, 0) for score in scores]
        stacked = lowered_call(graph, torch.ops.aten.cat.default, rows, 0)
        chosen = lowered_call(graph, OPS.topk_rows.default, stacked, group[0].args[1])
        for i, node in enumerate(group):
            row = lowered_call(graph, torch.ops.aten.select.int, chosen, 0, i)
            node.replace_all_uses_with(row)
    for node in group:
        graph.erase_node(node)
