"""Labels that a Trainer keeps from its model, handed to the model's token policy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from sparselora_fx.ir.token_lists import IGNORED
from sparselora_fx.model.attributes import REPLACED
from sparselora_fx.runtime.named_tokens import KeptLabels
from sparselora_fx.runtime.runtime import Runtime


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is calling a callback. Callbacks are not told, so it is looked for among
    the callers; None if something else calls."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def show_labels(trainer: Trainer, runtime: Runtime) -> None:
    """Let every loss that a Trainer computes show the batch's labels to the token policy, until
    `hide_labels`.

    Trainer takes labels out of the batch for ``label_smoothing_factor`` and ``compute_loss_func``,
    and so do many subclasses. The batch and the model's arguments stay as they are.
    """
    hide_labels(trainer)
    replaced = trainer.__dict__.get("compute_loss")
    compute_loss = trainer.compute_loss
    own_loss = has_own_loss(trainer)

    @functools.wraps(compute_loss)
    def showing(model: object, inputs: object, *args: object, **kwargs: object) -> object:
        before, runtime.kept_labels = runtime.kept_labels, kept_labels(inputs, own_loss=own_loss)
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            runtime.kept_labels = before

    setattr(showing, REPLACED, replaced)
    trainer.compute_loss = showing


def has_own_loss(trainer: Trainer) -> bool:
    """Whether a Trainer's loss may be another one than its model's."""
    replaced = trainer.__dict__.get("compute_loss")
    replaced = getattr(replaced, REPLACED, replaced)  # by us
    overridden = replaced is not None or type(trainer).compute_loss is not Trainer.compute_loss
    return overridden or trainer.compute_loss_func is not None


def hide_labels(trainer: Trainer) -> None:
    """Undo `show_labels`."""
    ours = trainer.__dict__.get("compute_loss")
    if not hasattr(ours, REPLACED):
        return
    del trainer.__dict__["compute_loss"]
    if getattr(ours, REPLACED) is not None:
        trainer.compute_loss = getattr(ours, REPLACED)


def kept_labels(inputs: object, *, own_loss: bool) -> KeptLabels | None:
    """A batch's ``labels``, or its ``completion_mask`` (true where a token is to be learned, as
    TRL's preference losses have it) as labels."""
    if not isinstance(inputs, Mapping):
        return None
    labels, mask = inputs.get("labels"), inputs.get("completion_mask")
    if isinstance(labels, Tensor):
        return KeptLabels(labels, own_loss)
    if isinstance(mask, Tensor):
        return KeptLabels(torch.where(mask.bool(), 0, IGNORED), True)
    return None
