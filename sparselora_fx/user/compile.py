"""`compile` and `restore`: the same model object goes in and comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from sparselora_fx import _torch
from sparselora_fx.compiler.backend import make_backend
from sparselora_fx.compiler.cuda_graphs import cuda_graphs_of
from sparselora_fx.errors import PlanError
from sparselora_fx.estimator.online import first_estimator
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.ir import autograd  # noqa: F401 - importing it registers derivatives
from sparselora_fx.model.attributes import RUNTIME
from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.conventions import convention_of
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.signature import output_embedding
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.plan.schedule import sparsity_scale_at
from sparselora_fx.plan.score import Score
from sparselora_fx.rewrite.rewrite import Options
from sparselora_fx.runtime.copies import put, stop_watching, take_off, watch_unloading
from sparselora_fx.runtime.forward import CompiledForward
from sparselora_fx.runtime.giving_up import is_hopeless
from sparselora_fx.runtime.regional import compile_blocks, repeated_blocks, restore_blocks
from sparselora_fx.runtime.runtime import Runtime, get_runtime, marked_by
from sparselora_fx.runtime.tracing_dora import restore_dora, trace_dora
from sparselora_fx.runtime.uncompiled import leave_uncompiled, restore_uncompiled
from sparselora_fx.runtime.watching import settle, watch_model
from sparselora_fx.user.compile_checks import check_switch, checked_plan, is_step, verified
from sparselora_fx.user.keywords import refuse_unknown
from sparselora_fx.watch.settings import Watch
from sparselora_fx.watch.state import watch_state


def compile(
    model: nn.Module,
    estimator: SVDEstimator | None = None,
    *,
    plan: SparsityPlan | float | Mapping[str, float] | str | None = None,
    backend: str = "inductor",
    dynamic: bool | None = None,
    lora_branch: str = "dense",
    compile_eval: bool = False,
    regional: bool = False,
    precompile: bool = False,
    trim_logits: bool = False,
    shift: bool | None = None,
    cuda_graphs: bool | str = "auto",
    verify_speed: bool | None = None,
    watch: Watch | None = None,
    strict: bool = False,
    **unknown: Any,
) -> nn.Module:
    """Make a model's training steps use only the channels that matter; returns the same object.

    Args:
        model: any module with frozen linears, usually a PEFT model; class and state_dict stay.
        estimator: from `SVDEstimator.build`; None: made as with ``calibrate="dense_phase"``.
        plan: also a number, a mapping or a YAML path; None: `SparsityPlan.auto()`, by stages.
        backend: "inductor" (native code), "aot_eager" or "eager" (PyTorch's own kernels).
        dynamic: as in `torch.compile`; None: the second batch length makes sizes dynamic.
        lora_branch: compute LoRA branches "dense", or "sparse": on the kept channels only.
        compile_eval: compile the (always dense) evaluation forward too.
        regional: compile each repeated block on its own; alike ones share graphs, the rest is eager
        precompile: the first training call compiles every level of the schedule (see `warm_up`).
        trim_logits: sparse steps compute logits for labelled tokens only; they return None instead.
        shift: token t predicts label t + 1 (True) or label t (False); None: as traced graphs show.
        cuda_graphs: replay steps of recurring sizes as CUDA graphs; True: and warn where not.
        verify_speed: time a few steps, and warn and stay dense if sparse is slower (decision 18).
        watch: compare with dense training now and then; see `Watch`.
        strict: raise what breaks in a sparse step; else it is taken dense, with one warning.
    What is compiled of it is restored first. Sparse calls keep no KV cache unless told. Raises, and
    leaves the model as it was: CompileError (no module, frozen weight, block or head; an unknown
    word, or KeywordError; a quantised base), EstimatorError (another model's), PlanError,
    WatchError.
    """
    refuse_unknown(unknown)
    asked = _Asked(
        plan, backend, dynamic, lora_branch, compile_eval, regional, precompile, trim_logits, shift,
        cuda_graphs, verified(verify_speed, backend), watch, strict,
    )  # fmt: skip
    return _compiled(model, estimator, asked)


@dataclass(frozen=True)
class _Asked:
    """The words of `compile`, which says what each means."""

    plan: Any
    backend: str
    dynamic: bool | None
    lora_branch: str
    compile_eval: bool
    regional: bool
    precompile: bool
    trim_logits: bool
    shift: bool | None
    cuda_graphs: bool | str
    verify_speed: bool | None
    watch: Watch | None
    strict: bool


def _compiled(model: nn.Module, estimator: SVDEstimator | None, asked: _Asked) -> nn.Module:
    for name in ("compile_eval", "regional", "precompile", "trim_logits", "strict"):
        check_switch(name, getattr(asked, name))
    if asked.dynamic is not None:
        check_switch("dynamic", asked.dynamic)
    backend, regional, trim = asked.backend, asked.regional, asked.trim_logits
    checked, frozen, sparsity = checked_plan(
        model, estimator, asked.plan, backend, asked.lora_branch, regional=regional
    )
    watching = watch_state(asked.watch, checked, frozen, sparsity)
    found, collector = first_estimator(model, estimator, checked, frozen, sparsity)
    score, convention = found.score_of(checked.score), convention_of(model, asked.shift)
    blocks = repeated_blocks(frozen) if regional else []
    captured = cuda_graphs_of(model, asked.cuda_graphs, backend=backend, regional=regional)
    head = output_embedding(model, regional=regional) if trim else None
    _restore_earlier(model, frozen)
    verify = asked.verify_speed
    runtime = Runtime(model, checked, sparsity, frozen, convention, collector, captured, verify)
    runtime.safety.strict, runtime.estimator_seconds = asked.strict, found.seconds
    watch_model(runtime, watching)
    runner, run = _runners(runtime, asked, score)
    forward = CompiledForward(model, runtime, run, asked.compile_eval, asked.precompile, trim)
    blockwise = partial(compile_blocks, runtime, blocks, runner, asked.dynamic)
    return _attach(runtime, forward, found, score, head, blockwise)


def _runners(
    runtime: Runtime, asked: _Asked, score: Score
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The backend, and the model's forward under it; uncompiled where blocks are compiled apart."""
    plan, forward = runtime.plan, runtime.model.forward
    wanted = runtime.verify_speed
    weigh = wanted is True or (wanted is None and bool(plan.start_step))
    terms = plan.channel_multiple, asked.lora_branch, score, plan.track_adapter
    runtime.options = Options(*terms, weigh=weigh)
    blocks = block_names(runtime.frozen).values()
    runner = make_backend(runtime, asked.backend, runtime.options, blocks)
    if asked.regional:
        return runner, forward
    return runner, _torch.compile_callable(forward, runner, asked.dynamic)


def _attach(
    runtime: Runtime,
    forward: CompiledForward,
    estimator: SVDEstimator,
    score: Score,
    head: nn.Module | None,
    compile_apart: Callable[[], None],
) -> nn.Module:
    """Put on the model all that belongs to a compilation, or nothing if that fails."""
    model = runtime.model
    model.__dict__[RUNTIME] = runtime
    try:
        compile_apart()
        if not is_hopeless(runtime):  # a hook would only cut a model's graphs in more places
            runtime.attached.mark(estimator.factors, estimator.vectors(runtime.frozen, score))
            runtime.attached.mark_model(head)
        leave_uncompiled(model)
        trace_dora(model)
        put(model, "forward", forward)
        watch_unloading(model, partial(_restore_if, runtime))
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `compile`: the model computes, saves and looks as before. Returns the same object.

    PEFT's ``merge_and_unload()`` and ``unload()`` of a compiled model do it too. Copies and pickles
    of a compiled model (`copy.deepcopy`, ``torch.save(model)``) are restored ones.

    Works when something else (such as accelerate's mixed precision) has wrapped ``model.forward``
    since: the wrapped forward then passes straight through to the original.

    Raises:
        CompileError: the model is not compiled.
    """
    runtime = get_runtime(model)
    runtime.active = False
    restore_blocks(runtime)
    restore_uncompiled(model)
    restore_dora(model)
    runtime.attached.unmark()
    take_off(model, "forward")
    stop_watching(model)
    del model.__dict__[RUNTIME]
    return model


def _restore_if(runtime: Runtime) -> None:
    """Undo one compilation, unless that is done."""
    if runtime.active:
        restore(runtime.model)


def step(model: nn.Module, n: int, total: int | None = None) -> None:
    """Tell a compiled model which optimizer step comes next: its plan's schedule is followed.

    Args:
        model: compiled with `compile`.
        n: 0-based optimizer step; call it before the step's first forward, on resume with the
            resumed step.
        total: all optimizer steps of the training; needed where the plan's schedule has fractions.

    Raises:
        CompileError: the model is not compiled. PlanError: a fraction and no total, or a negative
        step, or one that is no int. DriftError: a watch that is to stop training finds drift.
    """
    runtime = get_runtime(model)
    if not is_step(n, 0) or not (total is None or is_step(total, 1)):
        raise PlanError(
            f"step is {n!r} of {total!r}; allowed: two ints, n >= 0 and total >= 1, or no total"
        )
    plan = runtime.plan
    sparsity_scale_at(
        n, total, plan.start_step, plan.end_step, plan.ramp
    )  # refuses a fraction without total
    settle(runtime, between_steps=True)
    runtime.step = (n, total)
    if plan.too_short(total):
        runtime.dense_calls.add("the training is shorter than the plan's min_steps")
        runtime.notices.warn(
            f"a training of {total} steps stays dense: the plan is sparse in trainings of at least "
            f"{plan.min_steps} (min_steps; docs/evidence.md). For sparse steps all the same give a "
            "plan, such as plan=0.5 or plan=sparselora_fx.SparsityPlan.auto(min_steps=0)",
            about="min_steps",
        )


def _restore_earlier(model: nn.Module, frozen: list[FrozenWeight]) -> None:
    """Restore what is compiled of this model: itself, and any other that shares frozen linears.

    Two marks on one linear would read as a weight that is used twice, which stays dense.
    """
    if RUNTIME in model.__dict__:
        restore(model)
    for other in marked_by(frozen):
        warnings.warn(
            f"a compiled {type(other.model).__name__} shares frozen linears with this "
            f"{type(model).__name__} (as after merge_and_unload, or with two adapters on one "
            "base), so that one is restored: a linear belongs to one compiled model at a time",
            stacklevel=3,
        )
        restore(other.model)
