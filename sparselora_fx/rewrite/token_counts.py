"""Nodes that say which rows of an activation count, from what says so of the batch's tokens."""

from __future__ import annotations

import operator

import torch
from torch import fx

from sparselora_fx.analysis.row_kinds import Part, TokenRows, Whole
from sparselora_fx.graph.nodes import tensor


def count_tokens(graph: fx.Graph, rows: TokenRows, counted: fx.Node) -> fx.Node:
    """A node that says of some rows ``[B, rows]`` whether they count, from ``counted[B, L]``; rows
    that are no tokens of the batch count."""
    if isinstance(rows, Whole):
        return counted
    if isinstance(rows, Part):
        source = count_tokens(graph, rows.rows, counted)
        key = (slice(None), slice(rows.start, rows.stop, rows.step))
        return graph.call_function(operator.getitem, (source, key))
    parts = [
        _all_true(graph, part) if isinstance(part, fx.Node) else count_tokens(graph, part, counted)
        for part in rows.parts
    ]
    return graph.call_function(torch.cat, (parts, 1))


def _all_true(graph: fx.Graph, node: fx.Node) -> fx.Node:
    held = node
    example = tensor(node)
    assert example is not None
    for _ in range(example.dim() - 2):
        held = graph.call_method("select", (held, -1, 0))
    return graph.call_function(torch.ones_like, (held,), {"dtype": torch.bool})
