"""Scores of an attention with a mask, built by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparselora_fx.analysis.mask_values import MaskValues
from sparselora_fx.analysis.score_spans import ScoreSpans
from tests.support.small_graphs import Small

MASK = torch.ones(2, 5, dtype=torch.int64)
Change = Callable[[Small, fx.Node, fx.Node], fx.Node]


def scores_of(change: Change) -> tuple[ScoreSpans, fx.Node, Small]:
    """Scores ``[2, 3, 5, 5]`` of queries and keys, changed with a mask ``bool[2, 1, 1, 5]``."""
    small = Small()
    mask = small.input("mask", 2, 5, dtype=torch.int64)
    q, k = small.input("q", 2, 3, 5, 4), small.input("k", 2, 3, 5, 4)
    raw = small.call(torch.matmul, q, small.call("transpose", k, -1, -2))
    shown = small.call("to", small.call("view", mask, 2, 1, 1, 5), torch.bool)
    end = change(small, raw, shown)
    small.graph.output((end,))
    inputs: list[Any] = [
        MASK if n.name == "mask" else torch.zeros(n.meta["example_value"].shape)
        for n in small.graph.find_nodes(op="placeholder")
    ]
    return ScoreSpans(MaskValues(small.gm, inputs, {"attention_mask": MASK})), end, small


def filled(small: Small, scores: fx.Node, shown: fx.Node, low: float = -1e9) -> fx.Node:
    return small.call("masked_fill", scores, small.call("logical_not", shown), low)


def added(small: Small, scores: fx.Node, shown: fx.Node, low: float = -1e9) -> fx.Node:
    return small.call(torch.add, scores, small.call(torch.where, shown, 0.0, low))
