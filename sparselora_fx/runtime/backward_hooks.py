"""Hear of the backward of a call: when it begins, and that it has run to its end."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils import _pytree as pytree

from sparselora_fx import _torch


def on_backward(
    result: object, end: Callable[[], None], begin: Callable[[], None] | None = None
) -> None:
    """Call ``begin`` when the first backward of a call begins, and ``end`` when that has ended; a
    backward that raises has no end.

    Args:
        result: what the model returned.
    """
    begun: list[bool] = []

    def in_backward(gradient: Tensor) -> None:
        if begun:
            return
        begun.append(True)
        if begin is not None:
            begin()
        _torch.after_backward(end)

    tensors = {id(t): t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}
    for root in (t for t in tensors.values() if t.requires_grad):
        root.register_hook(in_backward)
