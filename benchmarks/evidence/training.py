"""One run: fresh adapters, trained one way, judged as a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import sparselora_fx as slx
from benchmarks.evidence.arms import Arm, estimator_of
from benchmarks.evidence.model import Base
from benchmarks.evidence.tasks import Batch, Encoded, collate
from benchmarks.support import reference
from sparselora_fx.analysis.regions import kept_channels
from sparselora_fx.model.blocks import block_positions
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.plan.schedule import sparsity_scale_at


@dataclass(frozen=True)
class Settings:
    """What all runs of a file share."""

    steps: int = 60
    batch: int = 16
    tests: int = 256
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lora_rank: int = 16
    dtype: str = "bfloat16"
    backend: str = "inductor"
    model: str = "SmolLM2-135M-Instruct"


@dataclass
class Trained:
    """What a training leaves: adapters on the model, the loss of each step and the share of the
    main branch's FLOPs that was computed."""

    model: PeftModel
    losses: list[float] = field(default_factory=list)
    flops_share: float = 1.0


def train(
    base: Base, arm: Arm, plain: slx.SVDEstimator | None, items: list[Encoded], settings: Settings,
    *, seed: int, rate: float,
) -> Trained:  # fmt: skip
    """Train fresh adapters on the items in their order; ``seed`` decides adapters and dropout."""
    model = base.adapted(seed, settings.lora_rank, arm.targets).train()
    result = Trained(model)
    torch.compiler.reset()
    plan = arm.plan(base.layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    warm_up = max(1, settings.steps // 10)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, settings.steps)
    skipped = 0.0
    with _compiled(model, arm, plan, estimator_of(arm, plain, seed), settings) as share:
        for n in tqdm(range(settings.steps), desc=arm.says, mininterval=5, leave=False):
            batch = _batch(base, items[n * settings.batch : (n + 1) * settings.batch])
            with share(n) as kept:
                loss = model(**batch, **_answers_only(batch["labels"])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            result.losses.append(round(loss.item(), 4))
            skipped += (1 - kept()) * (_context_share(batch, plan) if plan else 0.0)
    result.flops_share = round(1 - skipped / settings.steps, 4)
    return result


def _batch(base: Base, items: list[Encoded]) -> Batch:
    batch = collate(items, base.tokenizer.pad_token_id or 0)
    return {name: value.to(base.device) for name, value in batch.items()}


def _answers_only(labels: Tensor) -> Batch:
    """Arguments that hold a model's logits to the columns in which some row has an answer's token:
    with the same loss, a fifth less time where answers are short."""
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    kept = (following != -100).any(0).nonzero().flatten()
    return {"logits_to_keep": kept, "shift_labels": following[:, kept]}


def _context_share(batch: Batch, plan: SparsityPlan) -> float:
    """The share of the tokens, padding left out, that a plan makes sparse."""
    if plan.tokens == "all":
        return 1.0
    carries = (batch["labels"][:, 1:] != -100).sum() / batch["attention_mask"].sum()
    return 1.0 - float(carries)


@contextmanager
def _compiled(
    model: PeftModel, arm: Arm, plan: SparsityPlan | None, estimator: Any, settings: Settings
) -> Iterator[Any]:
    """The model compiled for the arm, or with eager modules swapped in; restored afterwards.

    Yields a context for step n, which yields a function: the share of a sparse token's main-branch
    FLOPs that the step kept.
    """
    if arm.eager is not None:
        with _eager(model, arm.eager, plan, estimator, settings) as step:
            yield step
        return
    dense = SparsityPlan(0.0, start_step=0)
    slx.compile(model, estimator, plan=plan or dense, backend=settings.backend, regional=True)

    @contextmanager
    def step(n: int) -> Iterator[Any]:
        slx.step(model, n, settings.steps)
        with slx.record(model) as record:
            yield lambda: share_kept(model, record.sites)

    try:
        yield step
    finally:
        slx.restore(model)


@contextmanager
def _eager(
    model: PeftModel, gradients: str, plan: SparsityPlan | None, estimator: Any, settings: Settings
) -> Iterator[Any]:
    """Feed-forwards as eager modules in the plan's sparse steps."""
    assert plan is not None and isinstance(plan.sparsity, dict) and estimator is not None
    sparsity, multiple = plan.sparsity, plan.channel_multiple
    blocks = range(model.config.num_hidden_layers)
    levels = [(sparsity.get(f"layers.{i}.mlp", 0.0), 0.0) for i in blocks]

    @contextmanager
    def step(n: int) -> Iterator[Any]:
        scale = sparsity_scale_at(n, settings.steps, plan.start_step, plan.end_step, plan.ramp)
        if scale == 0:
            yield lambda: 1.0
            return
        shared = reference.apply(
            model, estimator.factors, levels, multiple=multiple, cut_gradients=gradients == "cut"
        )
        try:
            yield lambda: eager_share_kept(model, sparsity, multiple)
        finally:
            shared.restore()

    yield step


def share_kept(model: PeftModel, sites: dict[str, tuple[str, Tensor]]) -> float:
    """The share of a sparse token's FLOPs that remains in the frozen linears of the blocks, by what
    one call used (`slx.record`)."""
    kept = total = 0
    weights = frozen_weights(model)
    inside = block_positions(weights)
    for weight in weights:
        if weight.name not in inside:
            continue
        rows, columns = weight.out_features, weight.in_features
        total += rows * columns
        side, used = sites.get(weight.name, ("", torch.empty(0)))
        kept += (len(used) if side == "out" else rows) * (len(used) if side == "in" else columns)
    return kept / total


def eager_share_kept(model: PeftModel, sparsity: dict[str, float], multiple: int) -> float:
    """The same where feed-forwards alone are sparse, by the number of channels they keep."""
    kept = total = 0.0
    width = model.config.intermediate_size
    weights = frozen_weights(model)
    inside = block_positions(weights)
    for weight in weights:
        if weight.name in inside:
            size = weight.out_features * weight.in_features
            keys = [key for key in sparsity if f".{key}." in weight.name]
            total += size
            kept += size * (
                kept_channels(width, sparsity[keys[0]], multiple) / width if keys else 1
            )
    return kept / total


@torch.no_grad()
def judge(model: Any, base: Base, items: list[Encoded], size: int = 16) -> tuple[float, float]:
    """Score in points (0 to 100) and loss in nats per answer token, of the dense model."""
    model.eval()
    right, nats, tokens = 0, 0.0, 0
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        batch = _batch(base, chunk)
        hidden = inner.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        for row, item in enumerate(chunk):
            first = len(item.prompt) - 1
            states = hidden[row, first : first + len(item.answer)]
            logits = inner.get_output_embeddings()(states).float()
            wanted = torch.tensor(item.answer, device=logits.device)
            nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(item.answer)
            right += _is_right(logits, wanted, item.options)
    return round(100 * right / len(items), 3), round(nats / tokens, 4)


def _is_right(logits: Tensor, wanted: Tensor, options: tuple[int, ...]) -> bool:
    """Whether greedy decoding, held to the options where there are any, gives the answer."""
    if options:
        return int(logits[0, list(options)].argmax()) == 0
    return bool((logits.argmax(-1) == wanted).all())
