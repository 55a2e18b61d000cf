"""The graphs inside a graph: bodies of higher-order ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx


def bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule, list[object]]]:
    """Every higher-order op of a graph: ``(call node, body, operands in the order of the body's
    placeholders)``.

    Covers activation checkpointing, `invoke_subgraph` and any op that takes one body and then its
    operands.
    """
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        owned = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        modules = [(a, getattr(gm, str(a.target), None)) for a in owned]
        graphs = [(a, m) for a, m in modules if isinstance(m, fx.GraphModule)]
        if len(graphs) != 1:
            continue
        operands = [a for a in node.args if a is not graphs[0][0] and not isinstance(a, str)]
        body = graphs[0][1]
        if len(operands) == len(body.graph.find_nodes(op="placeholder")):
            yield node, body, operands
