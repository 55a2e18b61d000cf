"""Tokens whose prediction carries loss, where the model's own labels do not tell: named by the
user, or read from labels that a training loop keeps from the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from sparselora_fx.errors import PlanError

OUTPUT_TOKENS = "output_tokens"  # the key of a batch that names them; the model never sees it
_named: ContextVar[Tensor | None] = ContextVar(OUTPUT_TOKENS, default=None)


class KeptLabels(NamedTuple):
    """Labels ``int64[B, L]`` of the present batch that its model is called without. ``own_loss``:
    the loss is the user's own, so nobody knows whether it shifts them."""

    labels: Tensor
    own_loss: bool


@contextmanager
def output_tokens(mask: Tensor) -> Iterator[None]:
    """Name the tokens whose prediction carries loss, for the forwards of compiled models inside.

    For losses that a model does not compute from labels of its own: preference losses, distillation
    and the like. Named tokens stay dense in sparse steps, as with labels; they take the place of
    the call's labels. They count where the plan says ``tokens="context"``. The same mask may also
    be a key of the batch, ``model(**batch, output_tokens=mask)``, which the model does not get to
    see.

        with slx.output_tokens(mask):
            logits = model(input_ids=ids, attention_mask=seen).logits

    Args:
        mask: bool[B, L], true at token t if the prediction made from token t counts. In a causal
            model that is the token before a label.

    Raises:
        PlanError: the mask is no bool tensor of two dimensions; in the forward: it is not of the
            shape of the call's tokens.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        raise PlanError(
            f"output_tokens got {_described(mask)}; it takes a bool tensor [batch, tokens], true "
            "where a token's prediction counts, such as labels != -100 shifted as the loss does"
        )
    token = _named.set(mask)
    try:
        yield
    finally:
        _named.reset(token)


def named_tokens() -> Tensor | None:
    """The mask of the innermost open `output_tokens`."""
    return _named.get()


def checked(mask: object, grid: Tensor) -> Tensor:
    """A mask that was named, on the grid's device; `PlanError` if its shape or dtype is another."""
    if not isinstance(mask, Tensor) or mask.shape != grid.shape or mask.dtype != torch.bool:
        got = _described(mask) if isinstance(mask, Tensor) else repr(mask)
        raise PlanError(
            f"output_tokens is {got}, and the call's tokens are {tuple(grid.shape)}; "
            "name the tokens of each forward by a bool mask of their own shape"
        )
    return mask.to(grid.device)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
