"""Drive a plan's schedule from a Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselora_fx.api import step
from sparselora_fx.errors import CompileError
from sparselora_fx.state import ATTRIBUTE


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """``Trainer(model=model, callbacks=[SparsityCallback()])``: tells the model each optimizer
    step before it begins.

    Follows the Trainer's own ``global_step`` and ``max_steps``, so gradient accumulation and
    resuming from a checkpoint need nothing more. Raises `CompileError` at the start of training if
    no module of the model is compiled.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._drive(state, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._drive(state, kwargs["model"])

    def _drive(self, state: TrainerState, model: nn.Module) -> None:
        for module in model.modules():
            if ATTRIBUTE in module.__dict__:
                step(module, state.global_step, state.max_steps)
                return
        raise CompileError(
            "SparsityCallback found no compiled model; "
            "call sparselora_fx.compile(model, estimator) before the Trainer"
        )
