"""Measure what each region's sparsity costs: the loss change when it alone is sparse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparselora_fx.errors import CompileError, SensitivityError
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.ir.token_lists import IGNORED
from sparselora_fx.model.attributes import RUNTIME
from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.frozen_weights import canonical_path, frozen_weights
from sparselora_fx.model.preserve import kept_modes, kept_random_numbers
from sparselora_fx.plan.domain_tables import DomainTables, check_domains
from sparselora_fx.plan.plan import Sparsity, SparsityPlan
from sparselora_fx.plan.region_keys import region_keys
from sparselora_fx.plan.sensitivity_table import Measurement, SensitivityTable
from sparselora_fx.runtime.calls import Call, CallKind
from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.user.compile import compile, restore
from sparselora_fx.user.record import record

LEVELS = (0.25, 0.5, 0.75, 0.9)
Batch = dict[str, Any]


@dataclass(frozen=True)
class _Region:
    """A region that the passes rewrite: where it is, its sites by name, its keys in a plan."""

    name: str
    kind: str
    sites: tuple[str, ...]
    keys: tuple[str, ...]


@overload
def sensitivity(
    model: nn.Module,
    estimator: SVDEstimator,
    batches: Mapping[str, Iterable[Mapping[str, object]]],
    levels: Iterable[float] = ...,
    *,
    tokens: str | Callable[[dict[str, Any]], object] = ...,
    channel_multiple: int = ...,
    lora_branch: str = ...,
    backend: str = ...,
    progress: bool = ...,
) -> DomainTables: ...
@overload
def sensitivity(
    model: nn.Module,
    estimator: SVDEstimator,
    batches: Iterable[Mapping[str, object]],
    levels: Iterable[float] = ...,
    *,
    tokens: str | Callable[[dict[str, Any]], object] = ...,
    channel_multiple: int = ...,
    lora_branch: str = ...,
    backend: str = ...,
    progress: bool = ...,
) -> SensitivityTable: ...
def sensitivity(
    model: nn.Module,
    estimator: SVDEstimator,
    batches: Iterable[Mapping[str, object]] | Mapping[str, Iterable[Mapping[str, object]]],
    levels: Iterable[float] = LEVELS,
    *,
    tokens: str | Callable[[dict[str, Any]], object] = "context",
    channel_multiple: int = 16,
    lora_branch: str = "dense",
    backend: str = "inductor",
    progress: bool = True,
) -> SensitivityTable | DomainTables:
    """The loss change of every region at every level, when it alone is sparse.

    The loss is the compiled model's, in evaluation mode (no dropout), without gradients, each
    batch under the same seed and weighted by its labels that count. Dense and sparse run on the
    same batches through the same compiler. Nothing is trained: the table tells what a region's
    sparsity costs now, not how well training adapts to it.

    Repeated blocks are compiled one by one and share graphs: ``1 + kinds * levels`` of them at
    any depth (for each kind of block). A model without numbered blocks is compiled whole:
    ``1 + regions * levels``.

    Args:
        model: not compiled; left as it was, also if a batch raises.
        estimator: of this model.
        batches: keyword arguments of the model, which must return a loss; read once, kept. Or a
            mapping of names to such batches, one for each kind of data: `DomainTables` come back.
        levels: fractions of channels to skip, in (0, 1).
        tokens, channel_multiple: as in `SparsityPlan`. lora_branch, backend: as in `compile`.

    Raises:
        SensitivityError: no batch, no loss, a level out of range, or no region to measure.
        CompileError, EstimatorError, PlanError: as `compile`, and if the model is compiled already.
    """
    kept, steps = _by_domain(batches), _check_levels(levels)
    if RUNTIME in model.__dict__:
        raise CompileError("the model is already compiled; call sparselora_fx.restore(model) first")
    plan = SparsityPlan(steps[-1], tokens=tokens, start_step=0, channel_multiple=channel_multiple)
    options: dict[str, Any] = {
        "plan": plan,
        "lora_branch": lora_branch,
        "regional": bool(block_names(frozen_weights(model))),
        "dynamic": True if len({_shapes(b) for own in kept.values() for b in own}) > 1 else None,
    }
    with _untouched(model), torch.no_grad():
        regions = _regions(model, estimator, next(iter(kept.values()))[0], options)
        compile(model, estimator, backend=backend, **options)
        found = {d: _measure(model, own, regions, steps, progress) for d, own in kept.items()}
    return DomainTables(found) if isinstance(batches, Mapping) else found[""]


def _by_domain(
    batches: Iterable[Mapping[str, object]] | Mapping[str, Iterable[Mapping[str, object]]],
) -> dict[str, list[Batch]]:
    """Lists of batches by domain; one that is called "" where none were named."""
    named: dict[str, Any] = {"": batches}
    if isinstance(batches, Mapping):
        check_domains(batches)
        named = dict(batches)
    kept: dict[str, list[Batch]] = {}
    for domain, own in named.items():
        if isinstance(own, Tensor) or not isinstance(own, Iterable):
            raise SensitivityError(
                f"domain {domain!r} holds a {type(own).__name__}; give a list of batches for each "
                "domain, or a list of batches alone"
            )
        kept[domain] = [dict(batch) for batch in own]
        if not kept[domain]:
            where = f" for {domain!r}" if domain else ""
            raise SensitivityError(
                f"there is no batch{where}; give at least one, as a mapping of arguments"
            )
    return kept


def _measure(
    model: nn.Module, batches: list[Batch], regions: list[_Region], levels: list[float], show: bool
) -> SensitivityTable:
    runtime = get_runtime(model)
    rows = []
    runs = (1 + len(regions) * len(levels)) * len(batches)
    with tqdm(total=runs, desc="sensitivity", unit="batch", disable=not show) as bar:
        runtime.call = Call(CallKind.MEASUREMENT)
        dense, _ = _mean_loss(model, batches, bar)
        sparse_tokens = 0.0
        for region in regions:
            for level in levels:
                sparsity = dict.fromkeys(region.sites, Sparsity(level, level))
                runtime.call = Call(CallKind.MEASUREMENT, sparsity=sparsity)
                with record(model) as used:
                    loss, sparse_tokens = _mean_loss(model, batches, bar)
                saved = _saved(runtime, {name: len(idx) for name, (_, idx) in used.sites.items()})
                rows.append(
                    Measurement(region.name, region.kind, level, loss, loss - dense, saved,
                                region.keys)
                )  # fmt: skip
    plan = runtime.plan
    total = sum(weight.out_features * weight.in_features for weight in runtime.frozen)
    words = plan.tokens if isinstance(plan.tokens, str) else None
    return SensitivityTable(
        tuple(rows), dense, total, sparse_tokens, words, plan.channel_multiple, runtime.graphs
    )


def _mean_loss(model: nn.Module, batches: list[Batch], bar: Any) -> tuple[float, float]:
    """Mean loss over the batches, and the share of their real tokens that were sparse."""
    runtime = get_runtime(model)
    total = weights = sparse = real = 0.0
    for batch in batches:
        loss, weight = _loss(model, batch), _counted(batch)
        total, weights = total + loss * weight, weights + weight
        if runtime.trace_inputs.tokens:
            sparse += float(runtime.trace_inputs.tokens[0].sum())
        elif runtime.trace_inputs.every:
            sparse += _real_tokens(batch)
        real += _real_tokens(batch)
        bar.update()
    return total / weights, (sparse / real if real else 1.0)


def _loss(model: nn.Module, batch: Batch) -> float:
    torch.manual_seed(0)
    device = next(model.parameters()).device
    out = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SensitivityError(
            f"the model returned {type(out).__name__} without a loss; batches need labels, "
            "and the model must return an output with a scalar .loss"
        )
    return float(loss)


def _counted(batch: Batch) -> float:
    """How much a batch's mean loss weighs: its labels that count, or 1."""
    labels = batch.get("labels")
    count = int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else 1
    return float(max(1, count))


def _real_tokens(batch: Batch) -> float:
    for key in ("attention_mask", "input_ids"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() == 2:
            return float(value.sum() if key == "attention_mask" else value.numel())
    return 0.0


def _saved(runtime: Runtime, kept: Mapping[str, int]) -> int:
    """Multiply-adds that a sparse token no longer costs, given rows or columns kept by site."""
    weights = {weight.name: weight for weight in runtime.frozen}
    saved = 0
    for key, left in kept.items():  # a further use of a linear has a key of its own
        name = key.partition("#")[0]
        n, k = weights[name].out_features, weights[name].in_features
        out = runtime.seen[name].report.role == "out"
        saved += (n - left) * k if out else n * (k - left)
    return saved


def _regions(
    model: nn.Module, estimator: SVDEstimator, batch: Batch, options: Mapping[str, Any]
) -> list[_Region]:
    """What the passes rewrite, found by tracing one batch with every region sparse."""
    compile(model, estimator, backend="eager", **options)
    runtime = get_runtime(model)
    runtime.call = Call(CallKind.MEASUREMENT, sparsity=runtime.sparsity)
    _loss(model, batch)
    found: dict[tuple[str, str], list[str]] = {}
    for weight in runtime.frozen:
        seen = runtime.seen.get(weight.name)
        if seen is not None and seen.report.role != "dense":
            found.setdefault((seen.region, seen.kind), []).append(weight.name)
    restore(model)
    if not found:
        reasons = {seen.report.reason for seen in runtime.seen.values()}
        raise SensitivityError(
            "the passes found no region to make sparse, so there is nothing to measure"
            + (f" (reasons: {'; '.join(sorted(reasons))})" if reasons else "")
        )
    names = [weight.name for weight in runtime.frozen]
    return [
        _Region(canonical_path(where), kind, tuple(sites), region_keys(where, sites, names))
        for (where, kind), sites in found.items()
    ]


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, random numbers and the model's own forward back afterwards."""
    with kept_random_numbers(model), kept_modes(model):
        try:
            model.eval()
            yield
        finally:
            if RUNTIME in model.__dict__:
                restore(model)


def _check_levels(levels: Iterable[float]) -> list[float]:
    found = sorted({float(level) for level in levels})
    if not found or not 0 < found[0] <= found[-1] < 1:
        raise SensitivityError(
            f"levels are {found}; allowed: at least one number, each above 0 and below 1"
        )
    return found


def _shapes(batch: Batch) -> tuple[object, ...]:
    return tuple((key, tuple(v.shape)) for key, v in batch.items() if isinstance(v, Tensor))
