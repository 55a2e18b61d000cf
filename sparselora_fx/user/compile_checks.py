"""What `compile` was given, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import nn

from sparselora_fx.compiler.switches import check_switches
from sparselora_fx.errors import CompileError, PlanError
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.lowering import cache_key, inductor_backend
from sparselora_fx.model.frozen_weights import FrozenWeight, frozen_weights
from sparselora_fx.model.opaque import refuse_opaque, warn_opaque
from sparselora_fx.model.signature import base_model
from sparselora_fx.model.text_part import beside_text
from sparselora_fx.plan.plan import Sparsity, SparsityPlan


def check_switch(name: str, value: Any) -> None:
    """`CompileError` for what is no bool: a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise CompileError(f"{name} must be True or False, got {value!r}")


def is_step(n: object, least: int) -> bool:
    """Whether it is a whole number of steps, and at least so many."""
    return isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= least


def verified(wanted: Any, backend: str) -> bool | None:
    """As `SpeedCheck` takes it: only native code is there to be fast, unless one asks."""
    if wanted not in (True, False, None):
        raise CompileError(f"verify_speed must be True, False or None, got {wanted!r}")
    return False if wanted is None and backend != "inductor" else wanted


def _check_words(
    model: Any, estimator: Any, plan: Any, backend: str, lora_branch: str
) -> SparsityPlan:
    """The plan, if the words that came with it are known and it has an estimator to go with."""
    if not isinstance(model, nn.Module):
        raise CompileError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = SparsityPlan.auto() if plan is None else plan
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


def checked_plan(
    model: nn.Module,
    estimator: SVDEstimator | None,
    plan: Any,
    backend: str,
    lora_branch: str,
    *,
    regional: bool,
) -> tuple[SparsityPlan, list[FrozenWeight], dict[str, Sparsity]]:
    """The plan, the model's frozen weights and the sparsity of each, if all fit together."""
    plan = _check_words(model, estimator, plan, backend, lora_branch)
    frozen = _frozen_on_device(model)
    if estimator is not None:
        estimator.check(model)
    sparsity = plan.resolve(frozen, [name for name, _ in model.named_modules()])
    _check_multiple(plan, frozen, sparsity)
    if regional:
        sparsity |= dict.fromkeys(_other_stacks(model, plan, frozen), Sparsity(0.0, 0.0))
    warn_opaque(model, len(frozen))
    return plan, frozen, sparsity


def _other_stacks(
    model: nn.Module, plan: SparsityPlan, frozen: list[FrozenWeight]
) -> Iterable[str]:
    """Weights that stay dense in blocks compiled one by one, where no graph shows whose rows they
    get, and one graph serves alike blocks of all stacks. Where all tokens are sparse, none."""
    config = getattr(base_model(model), "config", None)
    apart = plan.tokens != "all" and not getattr(config, "is_encoder_decoder", False)
    return beside_text(model, frozen) if apart else ()


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
