"""The example values of new nodes: the only place that writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def set_value(node: fx.Node, example: Any) -> None:
    """Give a new node an example value: a fake tensor, a symbolic integer, a tuple, or None."""
    node.meta["example_value"] = example


def with_stand_in(node: fx.Node, model: fx.Node, *, rank: int, channels: int) -> fx.Node:
    """Give a new node an example value that is right in rank, channels and dtype (its token count
    is not known)."""
    dtype = model.meta["example_value"].dtype
    shape = (*[3] * (rank - 1), channels)
    set_value(node, torch.empty(shape, dtype=dtype, device="meta"))
    return node


def shaped(node: fx.Node, like: fx.Node) -> fx.Node:
    """Give a new node the example value of another."""
    set_value(node, like.meta["example_value"])
    return node
