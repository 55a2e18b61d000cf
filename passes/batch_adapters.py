"""One matmul for the down-projections of all LoRA branches that read the same input."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import argument, op_name, tensor
from sparselora_fx.regions import Rewrite, is_trainable
from sparselora_fx.values import CASTS

_NARROW = 4  # a down-projection is at least this many times narrower than its input


def batch_adapters(rewrite: Rewrite) -> int:
    """Join trained, narrow linears without bias that read one input. Returns the linears joined.

    Before:  p: [T, r] = linear(x, Aq);  q: [T, r] = linear(x, Ak);  ...     three reads of x
    After:   y: [T, 2r] = linear(x, cat(Aq, Ak));  p = narrow(y, -1, 0, r);  q = narrow(y, -1, r, r)
    Keeps:   every value up to the rounding of another blocking, and so every gradient; the gradient
             to x becomes one matmul too, where several results were added.
    Skips:   branches behind dropouts of their own: they read different inputs.
    """
    groups: dict[Any, list[fx.Node]] = {}
    for node in rewrite.graph.nodes:
        if _is_down_projection(node):
            weight = tensor(node.args[1])
            assert weight is not None
            groups.setdefault((_source(node.args[0]), weight.dtype), []).append(node)
    joined = 0
    for group in groups.values():
        if len(group) > 1:
            _join(rewrite.graph, group)
            joined += len(group)
    return joined


def _is_down_projection(node: fx.Node) -> bool:
    if op_name(node) != "linear" or len(node.args) < 2 or argument(node, 2, "bias") is not None:
        return False
    x, weight = node.args[:2]
    example = tensor(weight)
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or example is None:
        return False
    narrow = example.dim() == 2 and int(example.shape[0]) * _NARROW <= int(example.shape[1])
    return narrow and is_trainable(weight)


def _source(x: Any) -> Any:
    """What tells one input from another: the node, or for a cast what it casts to what."""
    if op_name(x) in CASTS and isinstance(x.args[0], fx.Node):
        return (x.args[0], x.op, x.target, tuple(x.args[1:]), tuple(sorted(x.kwargs.items())))
    return x


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    with graph.inserting_before(first):
        weights = graph.call_function(torch.cat, ([node.args[1] for node in group],))
        joint = graph.call_function(torch.nn.functional.linear, (first.args[0], weights))
        start = 0
        for node in group:
            weight = tensor(node.args[1])
            assert weight is not None
            width = int(weight.shape[0])
            part = graph.call_function(torch.narrow, (joint, -1, start, width))
            part.meta["example_value"] = node.meta.get("example_value")
            node.replace_all_uses_with(part)
            start += width
    for node in group:
        graph.erase_node(node)
