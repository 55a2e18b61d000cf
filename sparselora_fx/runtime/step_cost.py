"""What one step of a compiled model costs, dense and sparse: counted, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from sparselora_fx.analysis.costs import rates_of
from sparselora_fx.analysis.step_work import GraphWork
from sparselora_fx.model.attributes import buffer_name
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.preserve import kept_buffers, kept_modes, kept_random_numbers
from sparselora_fx.plan.score import DEFAULT, parse_score
from sparselora_fx.runtime.calls import Call, CallKind
from sparselora_fx.runtime.outcomes import SiteOutcome
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.tally import TokenTally
from sparselora_fx.runtime.timer import Timer
from sparselora_fx.runtime.tracing import Traced
from sparselora_fx.runtime.warm_up import backward


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step on one batch, forward and backward, two for a multiply-add.

    Attributes:
        dense: everything, as the graph was traced.
        saved: what the passes took away.
        predictor: what choosing channels costs.
        copied: what copying kept weights takes, in FLOPs that the device does in that time; 0 where
            templates read them in place, and on devices that were not measured.
        tokens: of the batch's grid, padding included. sparse_tokens: those that are sparse.
        real_tokens: those that are no padding.
        sites: frozen linears that are sliced.
        dense_beside, sparse_beside: what else takes time (calls of ops, pointwise work, quantised
            weights that are unpacked), as ``copied``; 0 where it was not measured.
    """

    dense: int
    saved: int
    predictor: int
    copied: int
    tokens: int
    sparse_tokens: int
    real_tokens: int
    sites: int
    dense_beside: int = 0
    sparse_beside: int = 0

    @property
    def sparse(self) -> int:
        """FLOPs of the sparse step, with what its copies take."""
        return self.dense - self.saved + self.predictor + self.copied

    @property
    def ratio(self) -> float:
        """How many times faster a sparse step is predicted to be."""
        return (self.dense + self.dense_beside) / max(self.sparse + self.sparse_beside, 1)


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a dense and of a sparse compiled step, and the median ratio of pairs that
    ran one after the other."""

    dense: float
    sparse: float
    ratio: float


@contextmanager
def _aside(runtime: Runtime) -> Iterator[list[nn.Parameter]]:
    """Run steps that train nothing, count nowhere and leave no trace; yields what they train."""
    model = runtime.model
    recorders, runtime.recorders = runtime.recorders, []
    ahead, runtime.warm_up_next = runtime.warm_up_next, False
    ours = {id(buffer) for buffer in runtime.attached.own_buffers()}
    try:
        with kept_modes(model), kept_random_numbers(model), kept_buffers(model, ours):
            model.train()
            with torch.enable_grad():
                yield [p for p in model.parameters() if p.requires_grad]
    finally:
        runtime.call, runtime.recorders, runtime.warm_up_next = Call(), recorders, ahead


def traced_flops(traced: Traced) -> StepFlops:
    """Count a step that was traced: the work of its graphs before and after the passes. Where an
    op of them cannot be counted: by linears and adapters, as `tallied_flops`."""
    runtime, tally = traced.runtime, traced.tally
    grid, real = _tokens(traced.batch)
    tokens = grid, grid if tally.all_sparse else tally.sparse, real
    dense, sliced = traced.work.dense, traced.work.sparse
    if dense is None or sliced is None:
        return _step_flops(runtime, traced.seen, _token_flops(runtime) * real, tokens)
    saved = dense.flops - sliced.flops + sliced.choosing
    found = _step_flops(runtime, traced.seen, dense.flops, tokens)
    return replace(
        found,
        saved=saved,
        predictor=sliced.choosing,
        dense_beside=_beside(runtime, dense),
        sparse_beside=_beside(runtime, sliced),
    )


def _beside(runtime: Runtime, work: GraphWork) -> int:
    """See `Rates.beside`; 0 on a device that was not measured."""
    parameter = next(runtime.model.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    rates = rates_of(parameter.device, dtype)
    threads = torch.get_num_threads() if parameter.device.type == "cpu" else 1
    return 0 if rates is None else rates.beside(work, threads)


def tallied_flops(runtime: Runtime) -> StepFlops:
    """The same of the average call of a training, without running anything: by its tokens, frozen
    linears and adapters. Attention products are left out, so the ratio is a little too high."""
    tally: TokenTally = runtime.tally
    real = round(tally.real / tally.calls) if tally.calls else 1
    sparse = round(tally.sparse / tally.calls) if tally.calls else int(tally.all_sparse > 0)
    return _step_flops(runtime, runtime.seen, _token_flops(runtime) * real, (real, sparse, real))


def _token_flops(runtime: Runtime) -> int:
    """FLOPs of all frozen linears and adapters at one token."""
    linears = [w for w in runtime.frozen if not isinstance(w.module, nn.Embedding)]
    token = sum(4 * w.out_features * w.in_features for w in linears)
    trained = [p for p in runtime.model.parameters() if p.requires_grad and p.dim() == 2]
    return token + sum(6 * p.numel() for p in trained)


def _step_flops(
    runtime: Runtime,
    seen: Mapping[str, SiteOutcome],
    dense: int,
    tokens: tuple[int, int, int],
) -> StepFlops:
    """Put a step together. ``tokens``: of the grid, sparse, real."""
    grid, sparse, real = tokens
    sites = [w for w in runtime.frozen if w.name in seen and seen[w.name].sliced]
    saved = copied = predictor = 0
    for weight in sites if sparse else ():
        skipped, kept, other = _channels(runtime, weight, seen[weight.name])
        saved += 4 * skipped * other * sparse  # two products of two operations
        rates = rates_of(weight.weight.device, weight.dtype)
        if rates is not None:  # a kept weight is read and written for each product
            size = kept * other * weight.weight.element_size()
            copied += int(2 * 2 * size * rates.flops / rates.bytes)
        predictor += _predictor(runtime, weight, seen[weight.name], sparse)
    return StepFlops(dense, saved, predictor, copied, grid, sparse, real, len(sites))


def time_steps(runtime: Runtime, batch: Mapping[str, object], pairs: int) -> StepTimes | None:
    """Time dense and sparse compiled steps in turn; the first of each compiles, and is not counted.
    None: the device has no clock."""
    scales = (0.0, max(runtime.sparsity_scales()))
    found: list[tuple[float, float]] = []
    with _aside(runtime) as parameters:
        timer = Timer.of(parameters[0].device) if parameters else None
        if timer is None:
            return None
        for _ in range(pairs + 1):
            dense, sparse = (_timed(runtime, batch, parameters, timer, s) for s in scales)
            found.append((dense, sparse))
    counted = found[1:]
    return StepTimes(
        median(dense for dense, _ in counted),
        median(sparse for _, sparse in counted),
        median(dense / sparse for dense, sparse in counted),
    )


def verified_times(runtime: Runtime) -> StepTimes | None:
    """What `SpeedCheck` measured at the switch to sparse, if it did."""
    verdict = runtime.speed.verdict
    if verdict is None:
        return None
    return StepTimes(verdict.dense_ms / 1e3, verdict.sparse_ms / 1e3, 1 / verdict.ratio)


def _timed(
    runtime: Runtime,
    batch: Mapping[str, object],
    parameters: list[nn.Parameter],
    timer: Timer,
    scale: float,
) -> float:
    """Seconds of one compiled step; waits for it."""
    runtime.call = Call(CallKind.WARM_UP, level=scale)
    begin = timer.now()
    backward(runtime.model(**batch), parameters)
    end = timer.now()
    while not timer.passed(end):
        time.sleep(1e-4)
    return timer.elapsed_ms(begin, end) / 1e3


def _tokens(batch: Mapping[str, object]) -> tuple[int, int]:
    """Tokens of a batch's grid, and those that are no padding."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    embeds = batch.get("inputs_embeds")
    grid = ids.numel() if isinstance(ids, Tensor) else 0
    if not grid and isinstance(embeds, Tensor):
        grid = embeds[..., 0].numel()
    whole = isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == grid
    return grid, int(mask.sum()) if isinstance(mask, Tensor) and whole else grid


def _channels(runtime: Runtime, weight: FrozenWeight, outcome: SiteOutcome) -> tuple[int, int, int]:
    """Of one frozen linear: channels that are skipped and kept, and its other dimension."""
    own = runtime.sparsity[weight.name].scaled(1.0, at_most=runtime.caps.get(weight.name))
    level = own[outcome.kind != "ffn"]
    n, k = weight.out_features, weight.in_features
    channels, other = (n, k) if outcome.report.role == "out" else (k, n)
    multiple = runtime.plan.channel_multiple
    kept = max(1, int(channels * (1 - level)))
    kept = min(channels, -(-kept // multiple) * multiple)
    return channels - kept, kept, other


def _predictor(runtime: Runtime, weight: FrozenWeight, outcome: SiteOutcome, sparse: int) -> int:
    """FLOPs of the low-rank products of a site that is scored, on the tokens that are."""
    factor = weight.module._buffers.get(buffer_name(weight.param, "b"))
    if outcome.report.role != "out" or factor is None:
        return 0
    score = parse_score(runtime.plan.score or DEFAULT)
    rows = {"pooled": 1, "tokens": sparse, "strided": min(sparse, score.samples)}
    return 2 * factor.shape[0] * (weight.out_features + weight.in_features) * rows[score.context]
