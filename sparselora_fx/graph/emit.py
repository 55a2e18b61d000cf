"""The example values of new nodes: the only place that writes them.

A value is what the node's op returns for the example values of its inputs: fake tensors, whose
sizes stay symbolic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from sparselora_fx import _torch


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


def complete(graph: fx.Graph) -> None:
    """Give every call without an example value one, and every call whose value stands in for one.
    AOTAutograd's cache takes no graph in which it is not known what a method is called on."""
    mode = _mode_of(graph)
    if mode is None:
        return
    for node in graph.nodes:
        lacking = "example_value" not in node.meta or _stands_in(node.meta["example_value"])
        if node.op in ("call_function", "call_method") and lacking:
            with _computing(mode):
                set_value(node, _computed(node))


def _mode_of(graph: fx.Graph) -> Any:
    """The mode in which a graph's fake tensors are computed with; None if it has none."""
    examples = (node.meta.get("example_value") for node in graph.nodes)
    return next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), None)


def _stands_in(example: Any) -> bool:
    return any(
        isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor) for t in tree_leaves(example)
    )


@contextlib.contextmanager
def _computing(mode: Any) -> Iterator[None]:
    """Compute on fake tensors; no size is decided on, and no guard added."""
    quiet = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with torch.enable_grad(), mode, _torch.python_dispatcher(), quiet:
        yield


def _computed(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
