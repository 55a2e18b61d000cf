"""`compile` and `restore`: the same model object goes in and comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from sparselora_fx import _torch
from sparselora_fx.compiler.backend import make_backend
from sparselora_fx.compiler.cuda_graphs import cuda_graphs_of
from sparselora_fx.compiler.switches import check_switches
from sparselora_fx.errors import CompileError, PlanError
from sparselora_fx.estimator.online import first_estimator
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.ir import autograd  # noqa: F401 - importing it registers derivatives
from sparselora_fx.lowering import cache_key, inductor_backend
from sparselora_fx.model.attributes import RUNTIME
from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.conventions import convention_of
from sparselora_fx.model.frozen_weights import FrozenWeight, frozen_weights
from sparselora_fx.model.opaque import refuse_opaque, warn_opaque
from sparselora_fx.model.signature import output_embedding
from sparselora_fx.plan.plan import Sparsity, SparsityPlan
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
from sparselora_fx.user.keywords import refuse_unknown


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
    **unknown: Any,
) -> nn.Module:
    """Make a model's training steps use only the channels that matter; returns the same object.

    Args:
        model: any module with frozen linears, usually a PEFT model; class and state_dict stay.
        estimator: from `SVDEstimator.build`; None: made as with ``calibrate="dense_phase"``.
        plan: also a number, a mapping or a YAML path; None: a conservative structural default.
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
    What is compiled of it is restored first. Sparse calls keep no KV cache unless told. Raises, and
    leaves the model as it was: CompileError (no module, frozen weight, block or head; an unknown
    word, or KeywordError; a quantised base), EstimatorError (another model's), PlanError.
    """
    verified = _verified(verify_speed, backend, unknown)
    checked, frozen, sparsity = _checked(model, estimator, plan, backend, lora_branch)
    found, collector = first_estimator(model, estimator, checked, frozen, sparsity)
    score, convention = found.score_of(checked.score), convention_of(model, shift)
    blocks = repeated_blocks(frozen) if regional else []
    captured = cuda_graphs_of(model, cuda_graphs, backend=backend, regional=regional)
    head = output_embedding(model, regional=regional) if trim_logits else None
    _restore_earlier(model, frozen)
    runtime = Runtime(model, checked, sparsity, frozen, convention, collector, captured, verified)
    runner, run = _compiled(runtime, backend, lora_branch, score, dynamic, regional)
    forward = CompiledForward(model, runtime, run, compile_eval, precompile, trim_logits)
    blockwise = partial(compile_blocks, runtime, blocks, runner, dynamic)
    return _attach(runtime, forward, found, score, head, blockwise)


def _compiled(
    runtime: Runtime,
    backend: str,
    lora_branch: str,
    score: Score,
    dynamic: bool | None,
    apart: bool,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The backend, and the model's forward under it; uncompiled where blocks are ``apart``."""
    plan, forward = runtime.plan, runtime.model.forward
    wanted = runtime.verify_speed
    weigh = wanted is True or (wanted is None and bool(plan.start_step))
    terms = plan.channel_multiple, lora_branch, score, plan.track_adapter
    runtime.options = Options(*terms, weigh=weigh)
    blocks = block_names(runtime.frozen).values()
    runner = make_backend(runtime, backend, runtime.options, blocks)
    return runner, forward if apart else _torch.compile_callable(forward, runner, dynamic)


def _verified(wanted: Any, backend: str, unknown: Mapping[str, Any]) -> bool | None:
    """As `SpeedCheck` takes it: only native code is there to be fast, unless one asks."""
    refuse_unknown(unknown)
    if wanted not in (True, False, None):
        raise CompileError(f"verify_speed must be True, False or None, got {wanted!r}")
    return False if wanted is None and backend != "inductor" else wanted


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
        step.
    """
    runtime = get_runtime(model)
    if n < 0 or (total is not None and total < 1):
        raise PlanError(f"step is {n!r} of {total!r}; allowed: n >= 0 and total >= 1")
    plan = runtime.plan
    sparsity_scale_at(
        n, total, plan.start_step, plan.end_step, plan.ramp
    )  # refuses a fraction without total
    runtime.step = (n, total)


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


def _check_words(
    model: Any, estimator: Any, plan: Any, backend: str, lora_branch: str
) -> SparsityPlan:
    """The plan, if the words that came with it are known and it has an estimator to go with."""
    if not isinstance(model, nn.Module):
        raise CompileError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = SparsityPlan.default() if plan is None else plan
    checked: SparsityPlan = plan if isinstance(plan, SparsityPlan) else SparsityPlan(plan)
    if estimator is None:
        checked = replace(checked, calibrate="dense_phase")
    elif not isinstance(estimator, SVDEstimator):
        raise CompileError(
            f"estimator must be an SVDEstimator, got {type(estimator).__name__}; build one with "
            "sparselora_fx.SVDEstimator.build(model, rank=8), or leave it out and let the dense "
            "first steps make one"
        )
    elif checked.calibrate:
        raise CompileError(
            f"an estimator was given, and the plan says calibrate={checked.calibrate!r}, which "
            "makes one in training; leave one of them out"
        )
    if backend not in inductor_backend.BACKENDS:
        allowed = ", ".join(map(repr, inductor_backend.BACKENDS))
        raise CompileError(f"backend must be one of {allowed}, got {backend!r}")
    if lora_branch not in ("dense", "sparse"):
        raise CompileError(f"lora_branch must be 'dense' or 'sparse', got {lora_branch!r}")
    check_switches()
    if backend == "inductor":
        cache_key.key()  # refuses settings that cannot be read
    return checked


def _checked(
    model: nn.Module, estimator: SVDEstimator | None, plan: Any, backend: str, lora_branch: str
) -> tuple[SparsityPlan, list[FrozenWeight], dict[str, Sparsity]]:
    """The plan, the model's frozen weights and the sparsity of each, if all fit together."""
    plan = _check_words(model, estimator, plan, backend, lora_branch)
    frozen = _frozen_on_device(model)
    if estimator is not None:
        estimator.check(model)
    sparsity = plan.resolve(frozen, [name for name, _ in model.named_modules()])
    _check_multiple(plan, frozen, sparsity)
    warn_opaque(model, len(frozen))
    return plan, frozen, sparsity


def _frozen_on_device(model: nn.Module) -> list[FrozenWeight]:
    frozen = frozen_weights(model)
    refuse_opaque(model, len(frozen), CompileError)
    if not frozen:
        raise CompileError(
            "the model has no frozen linear weight, so there is nothing to skip; "
            "attach LoRA first (peft.get_peft_model) or set requires_grad=False on the base weights"
        )
    meta = [weight.name for weight in frozen if weight.weight.is_meta]
    if meta:
        raise CompileError(
            f"{len(meta)} frozen weights are on the meta device (first: {meta[0]}); "
            "load real weights first"
        )
    return frozen


def _check_multiple(
    plan: SparsityPlan, frozen: list[FrozenWeight], sparsity: Mapping[str, Sparsity]
) -> None:
    widths = [w.out_features for w in frozen if max(sparsity[w.name]) > 0]
    if widths and plan.channel_multiple > max(widths):
        raise PlanError(
            f"channel_multiple={plan.channel_multiple} asks to keep more channels than any layer "
            f"in the plan has ({max(widths)}); choose at most {max(widths)}, usually 16"
        )
