"""The ways of training that are compared, as plans and estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sparselora_fx as slx
from benchmarks.support.random_factors import noise
from sparselora_fx.plan.plan import SparsityPlan

RANK = 8
START = 0.05  # the part of training before anything is sparse, as by default
DENSE, UNTRAINED = "dense", "untrained"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        plan: from the number of blocks; None: nothing is sparse.
        estimator: "online" (calibrated in the dense first steps), "svd", "random" or "none".
        eager: by `benchmarks.support.reference`, in place of the compiler: "exact" gradients, or
            "cut" as in the reference implementation.
        targets: linears that carry adapters.
    """

    says: str
    plan: Callable[[int], SparsityPlan | None]
    estimator: str = "online"
    eager: str | None = None
    targets: tuple[str, ...] = ATTENTION


def span(layers: int, first: float, last: float) -> range:
    """Blocks from a fraction of the depth to another."""
    return range(round(first * layers), round(last * layers))


def ffn(
    sparsity: float, first: float, last: float = 1.0, **options: Any
) -> Callable[[int], SparsityPlan]:
    """Feed-forward regions of some blocks at one sparsity; the last block stays dense, as by
    default, unless all are meant (``first`` 0)."""

    def plan(layers: int) -> SparsityPlan:
        blocks = span(layers, first, last)
        blocks = blocks if first == 0 else range(blocks.start, min(blocks.stop, layers - 1))
        levels = {f"layers.{i}.mlp": sparsity for i in blocks}
        return SparsityPlan(levels, **({"start_step": START} | options))

    return plan


def with_attention(layers: int) -> SparsityPlan:
    """The deep plan with the attention of the same blocks at 0.5."""
    deep = ffn(0.9, DEEP)(layers).sparsity
    assert isinstance(deep, dict)
    return SparsityPlan(deep | {key.replace("mlp", "self_attn"): 0.5 for key in deep})


DEEP = 17 / 30  # of the depth: where the deep plans begin
WIDE = 7 / 30
UNIFORM = 0.36  # over all blocks: as many channels as the deep plan at 0.9 in 12 of 30

ARMS = {
    DENSE: Arm("dense LoRA, same compiler", lambda layers: None, "none"),
    # What `compile` takes without a plan, and what else it might take.
    "auto": Arm("slx.SparsityPlan.auto(), however short",
                lambda layers: SparsityPlan.auto(min_steps=0)),
    "auto-end": Arm("the same, the last fifth of training dense",
                    lambda layers: SparsityPlan.auto(min_steps=0, end_step=0.8)),
    "default": Arm("slx.SparsityPlan.default()", lambda layers: SparsityPlan.default()),
    "default-end": Arm("the same, the last fifth of training dense",
                       lambda layers: SparsityPlan("default", end_step=0.8)),
    "ffn75": Arm("the default without attention: FFN 0.75", ffn(0.75, WIDE)),
    "deep90": Arm("FFN 0.9 in the deep blocks", ffn(0.9, DEEP)),
    "deep90-end": Arm("the same, the last fifth dense", ffn(0.9, DEEP, end_step=0.8)),
    "deep90-start": Arm("the same, the first fifth dense", ffn(0.9, DEEP, start_step=0.2)),
    "deep97": Arm("FFN 0.97 in the deep blocks", ffn(0.97, DEEP)),
    "deep90-attention": Arm("deep90 and attention 0.5 there", with_attention),
    "wide90": Arm("FFN 0.9 but for the first quarter and the last block", ffn(0.9, WIDE)),
    "wide90-end": Arm("the same, the last fifth dense", ffn(0.9, WIDE, end_step=0.8)),
    "wide90-half": Arm("the same, the second half dense", ffn(0.9, WIDE, end_step=0.5)),
    # What may close the gap: adapters on the feed-forward too, scores that follow the adapters,
    # a slow start, another calibration.
    "dense-all": Arm("dense, LoRA on all linears", lambda layers: None, "none", targets=ALL),
    "wide90-all": Arm("wide90, LoRA on all linears", ffn(0.9, WIDE), targets=ALL),
    "wide90-track": Arm("wide90, scores follow the adapters",
                        ffn(0.9, WIDE, track_adapter=True), targets=ALL),
    "wide90-ramp": Arm("wide90 by way of 0.45 for a third of training",
                       ffn(0.9, WIDE, ramp=((0.05, 0.5), (0.35, 1.0)))),
    "wide90-refresh": Arm("wide90, calibrated again every 20 steps", ffn(0.9, WIDE, refresh=20)),
    # What the parts of the method do, at the deep plan.
    "svd": Arm("deep90, plain SVD", ffn(0.9, DEEP), "svd"),
    "pooled": Arm("deep90, the paper's score", ffn(0.9, DEEP, score="pooled"), "svd"),
    "random": Arm("deep90, random channels", ffn(0.9, DEEP, score="pooled"), "random"),
    "all-tokens": Arm("deep90, output tokens sparse too", ffn(0.9, DEEP, tokens="all")),
    "uniform": Arm("as many channels, in all blocks alike", ffn(UNIFORM, 0.0)),
    "wide-svd": Arm("wide90, plain SVD", ffn(0.9, WIDE), "svd"),
    "wide-random": Arm("wide90, random channels", ffn(0.9, WIDE, score="pooled"), "random"),
    "wide-all-tokens": Arm("wide90, output tokens sparse too", ffn(0.9, WIDE, tokens="all")),
    "eager": Arm("wide90 as eager modules, the paper's score", ffn(0.9, WIDE), "svd", "exact"),
    "eager-cut": Arm("the same with the reference's cut gradients", ffn(0.9, WIDE), "svd", "cut"),
}  # fmt: skip


def estimator_of(arm: Arm, plain: slx.SVDEstimator | None, seed: int) -> slx.SVDEstimator | None:
    """The estimator of an arm; None: made in the dense first steps."""
    if arm.estimator in ("online", "none"):
        return None
    assert plain is not None
    return noise(plain, seed) if arm.estimator == "random" else plain
