"""Drive a plan's schedule from a Hugging Face Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselora_fx.errors import CompileError
from sparselora_fx.model.attributes import RUNTIME
from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.runtime.step_cost import tallied_flops, verified_times
from sparselora_fx.runtime.watching import settle
from sparselora_fx.user.calibration_file import calibration_file, load_calibration, save_calibration
from sparselora_fx.user.collating import count_in_loader
from sparselora_fx.user.compile import step
from sparselora_fx.user.cost import Cost, bill, check_prices
from sparselora_fx.user.trainer_labels import has_own_loss, hide_labels, show_labels, trainer_of
from sparselora_fx.user.watch_file import load_watch, save_watch, watch_file

_SPEED = "sparselora_speed.json"  # in a checkpoint: what the speed check measured


def _nothing() -> None:
    """There is nothing to undo."""


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """``Trainer(model=model, callbacks=[SparsityCallback()])``: tells the model each optimizer
    step before it begins.

    Follows the Trainer's own ``global_step`` and ``max_steps``, so gradient accumulation and
    resuming from a checkpoint need nothing more. With a plan that calibrates in the dense phase,
    what was collected (later: the estimator) is saved in each checkpoint and loaded on resume; so
    is whether sparse steps were faster (``compile(verify_speed=)``), and where the model is watched
    (``compile(watch=)``) what the watch has seen. At the end the bill is printed (`Cost`).
    Labels that the Trainer keeps from the model (``label_smoothing_factor``, ``compute_loss_func``,
    a ``compute_loss`` of one's own) are shown to the token policy all the same: while it trains,
    the Trainer's ``compute_loss`` is wrapped. The training data loader counts each batch's tokens
    while they are on the CPU (`count_tokens`), so that no step waits for the GPU to do it.
    Raises `CompileError` at the start of training if no module of the model is compiled.

    Args:
        resume_from: the checkpoint that training resumes from, where it is not
            ``checkpoint-<step>`` in the Trainer's ``output_dir``.
        summary: print the bill at the end; its times are those of the speed check.
        price_per_hour: of the machine, in any currency, for the bill. watts: what it draws.
    """

    def __init__(
        self,
        resume_from: str | os.PathLike[str] | None = None,
        *,
        summary: bool = True,
        price_per_hour: float | None = None,
        watts: float | None = None,
    ) -> None:
        check_prices(price_per_hour=price_per_hour, watts=watts)
        self.resume_from = resume_from
        self.summary = summary
        self.price_per_hour = price_per_hour
        self.watts = watts
        self._stop_counting: Callable[[], None] = _nothing

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self._drive(state, kwargs["model"])
        trainer = trainer_of(self)
        self._stop_counting()  # the loader of a training that was cut off
        own_loss = trainer is not None and has_own_loss(trainer)
        loader = kwargs.get("train_dataloader")
        self._stop_counting = count_in_loader(model, loader, own_loss=own_loss)
        if trainer is not None:
            show_labels(trainer, get_runtime(model))
        if state.global_step > 0:
            self._resume(args, state, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._stop_counting()
        self._stop_counting = _nothing
        trainer = trainer_of(self)
        if trainer is not None:
            hide_labels(trainer)
        if self.summary and state.is_world_process_zero:
            print(self._bill(get_runtime(_compiled(kwargs["model"]))))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._drive(state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        settle(get_runtime(_compiled(kwargs["model"])), between_steps=True)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _compiled(kwargs["model"])
        runtime, folder = get_runtime(model), _checkpoint(args, state)
        if folder.is_dir():
            runtime.speed.save(folder / _SPEED)
            if runtime.watching is not None and state.is_world_process_zero:
                save_watch(model, watch_file(folder))
        if runtime.collector is None:
            return
        if folder.is_dir():
            save_calibration(model, calibration_file(folder))
        else:
            warnings.warn(
                f"there is no {str(folder)!r} to save the dense phase's calibration in; call "
                "sparselora_fx.save_calibration(model, file) from a callback of your own",
                stacklevel=2,
            )

    def _resume(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        given = self.resume_from or args.resume_from_checkpoint
        folder = Path(given) if isinstance(given, str | os.PathLike) else _checkpoint(args, state)
        runtime = get_runtime(model)
        runtime.speed.load(folder / _SPEED, next(model.parameters()).device)
        runtime.warn_of_speed()
        if runtime.watching is not None:
            self._resume_watch(state, model, watch_file(folder))
        if runtime.collector is None:
            return
        file = calibration_file(folder)
        if file.is_file():
            load_calibration(model, file)
            return
        warnings.warn(
            f"training resumes at step {state.global_step}, and {str(folder)!r} holds no "
            f"{file.name}: what the dense phase had collected before is lost. What it still reads "
            "is used; if it is over, a plain SVD of the weights. If the checkpoint is elsewhere, "
            "pass SparsityCallback(resume_from=its folder)",
            stacklevel=2,
        )

    def _resume_watch(self, state: TrainerState, model: nn.Module, file: Path) -> None:
        if file.is_file():
            load_watch(model, file)
            return
        warnings.warn(
            f"training resumes at step {state.global_step}, and there is no {str(file)!r}: the "
            "watch begins anew, at the plan's sparsity. If the checkpoint is elsewhere, pass "
            "SparsityCallback(resume_from=its folder)",
            stacklevel=2,
        )

    def _bill(self, runtime: Runtime) -> Cost:
        flops, times = tallied_flops(runtime), verified_times(runtime)
        return bill(runtime, flops, times, price_per_hour=self.price_per_hour, watts=self.watts)

    def _drive(self, state: TrainerState, model: nn.Module) -> nn.Module:
        found = _compiled(model)
        step(found, state.global_step, state.max_steps)
        return found


def _compiled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if RUNTIME in module.__dict__:
            return module
    raise CompileError(
        "SparsityCallback found no compiled model; "
        "call sparselora_fx.compile(model, estimator) before the Trainer"
    )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
