"""Independent choices of channels in one launch, on a GPU."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch
from torch import fx

from sparselora_fx import environment
from sparselora_fx.graph.emit import lowered_call
from sparselora_fx.graph.nodes import operand
from sparselora_fx.ir import joint_ops  # noqa: F401 - defines `topk_rows`
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.dependence import join_alike

_TOPK = OPS.topk_channels.default


def batch_topk(graph: fx.Graph) -> int:
    """Join top-k selections of equally many from equally many scores, where none waits for another:
    of attention's queries and keys, and of its values. Returns the selections joined.

    Before:  i = topk_channels(s: [N], k);  j = topk_channels(t: [N], k)
    After:   m = topk_rows(stack(s, t), k);  i = m[0];  j = m[1]

    A post-grad pass of Inductor: nodes are those of aten.
    """
    return join_alike(graph, _TOPK, _kind, partial(_rows, graph))


def _kind(node: fx.Node) -> Hashable | None:
    value = operand(node).meta["val"]
    if not environment.shares_launches(value.device.type):
        return None
    return value.shape[0], value.dtype, node.args[1:]


def _rows(graph: fx.Graph, group: list[fx.Node]) -> list[fx.Node]:
    unsqueeze, cat = torch.ops.aten.unsqueeze.default, torch.ops.aten.cat.default
    scores = [lowered_call(graph, unsqueeze, node.args[0], 0) for node in group]
    stacked = lowered_call(graph, cat, scores, 0)
    chosen = lowered_call(graph, OPS.topk_rows.default, stacked, group[0].args[1])
    select = torch.ops.aten.select.int
    return [lowered_call(graph, select, chosen, 0, i) for i in range(len(group))]
