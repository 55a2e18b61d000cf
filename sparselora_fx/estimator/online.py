"""Calibration that costs no step: moments of what dense steps read, and factors from them before
the first sparse one."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.calibrate import Found, Settings, finish, listed_as
from sparselora_fx.estimator.low_rank import Factors, compute_device, ranks_of
from sparselora_fx.estimator.sample_rows import Picked, distinct, pick
from sparselora_fx.estimator.statistics import DAMPING, Moment, Statistics, column_norms
from sparselora_fx.estimator.svd_estimator import SVDEstimator, assemble
from sparselora_fx.ir.token_lists import Tokens
from sparselora_fx.model.frozen_weights import FrozenWeight, fingerprint_of, shown
from sparselora_fx.model.weight_layout import likely_consumers
from sparselora_fx.plan.plan import Sparsity, SparsityPlan
from sparselora_fx.plan.schedule import sparsity_scale_at
from sparselora_fx.plan.score import Score

log = logging.getLogger(__name__)

DEFAULT_RANK = 8
_SETTINGS = Settings(DAMPING, None, 0, True)
_PATIENCE = 2.0  # seconds before a progress bar shows


@dataclass
class Collector:
    """Moments of what the weights of a plan read in dense steps; once built, the estimator.

    Attributes:
        weights: frozen weights that the plan makes sparse, by ``FrozenWeight.name``.
        ranks: of their factors, by canonical name.
        score: what the factors are for.
        moments: by the canonical name of the first weight of those that read one input.
        readers: the canonical names of all weights that read it, under the same key.
        calls: how many calls were observed.
        first: the number of the first of them, from which their rows follow.
        estimator: set by `build`; nothing is collected after it, unless `reopen` is called.
        turned: canonical names of square weights that graphs use transposed to what is listed.
    """

    weights: dict[str, FrozenWeight]
    ranks: dict[str, int]
    score: Score
    moments: dict[str, Moment] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    calls: int = 0
    first: int = 0
    estimator: SVDEstimator | None = None
    counting: bool = False  # whether what the present call reads counts
    picked: Picked | None = None
    turned: set[str] = field(default_factory=set)  # used the other way round than they are listed

    def __post_init__(self) -> None:
        listed = list(self.weights.values())
        self.full = {w.canonical for w in listed} - {w.canonical for w in likely_consumers(listed)}
        self.by_canonical = {w.canonical: w for w in listed}

    def begin(
        self, tokens: Tokens | None, total: int | None, device: torch.device, *, counting: bool
    ) -> list[Tensor]:
        """What the graphs of a dense call are told; see `sample_rows.pick`."""
        self.counting = counting and self.estimator is None
        self.picked = pick(tokens, device, self.first + self.calls, total)
        self.calls += self.counting
        return self.picked.tensors

    def turn(self, stored_kn: Mapping[str, bool | None]) -> None:
        """Note which weights, by name, a graph uses as stored ``[K, N]`` (None: it does not say).
        Only of square ones in layers written by hand that is not known before."""
        for name, kn in stored_kn.items():
            w = self.weights.get(name)
            if w is None or w.oriented or w.in_features != w.out_features:
                continue
            if kn is not None and kn != w.transposed:
                self.turned.add(w.canonical)

    def used(self, w: FrozenWeight) -> FrozenWeight:
        """A weight the way round that it is used."""
        return replace(w, transposed=not w.transposed) if w.canonical in self.turned else w

    def add(self, names: list[str], rows: Tensor, taken: Tensor | None) -> None:
        """Count the rows ``[n, K]`` that the named weights read.

        ``taken``: their indices where the input has another grid than the batch, else None.
        """
        assert self.picked is not None
        weights = [self.weights[name] for name in names if name in self.weights]
        weights = [w for w in weights if w.in_features == rows.shape[-1]]
        if not weights or not self.counting:
            return
        rows = rows[: self.picked.count] if taken is None else distinct(rows, taken)
        if not len(rows) or (taken is not None and len(rows) == 1 and not bool(rows.any())):
            return  # no token counts, or an empty input's row of padding
        key = weights[0].canonical
        with torch.no_grad(), _exact(rows.device):
            if key not in self.moments:
                norms = column_norms(self.used(weights[0]).logical())
                self.moments[key] = Moment(norms, full=key in self.full)
                self.readers[key] = [w.canonical for w in weights]
            self.moments[key].add(rows)

    def build(self) -> SVDEstimator:
        """Factors from what was observed, the paper's for weights that were not; frees the moments.

        Raises:
            EstimatorError: inf or NaN was observed, or the score needs the prior of a weight that
                was not reached.
        """
        start = time.perf_counter()
        missing = [w.name for w in self.weights.values() if w.canonical not in self._reached()]
        self._report(missing)
        found: list[Found] = []
        weights = list(self.weights.values())
        bar = tqdm(self.moments, desc="factors from the dense phase", delay=_PATIENCE, unit="input")
        with torch.no_grad(), _exact(weights[0].weight.device):
            for key in bar:
                for name in self.readers[key]:
                    w = self.by_canonical[name]
                    done = finish(self.used(w), self.moments[key], self.ranks[name], _SETTINGS)
                    found.append(listed_as(w, self.used(w), *done))
            self.estimator = assemble(
                weights, found, self.ranks, place=compute_device(None),
                progress=False, complete=False,
            )  # fmt: skip
        seconds = self.estimator.seconds = time.perf_counter() - start
        log.info("factors from %d observed calls took %.1f s", self.calls, seconds)
        self.forget()
        return self.estimator

    def reopen(self, step: int) -> None:
        """Collect anew from an optimizer step on: the factors in use stay until `build` makes
        others. Nothing of what was collected before has a part in it, so a resumed run observes
        what an uninterrupted one would."""
        if self.estimator is not None:
            self.forget()
            self.estimator, self.calls, self.first = None, 0, step

    def describe(self) -> str:
        """A line for `explain`."""
        reached = len(self._reached() if self.estimator is None else self.estimator.statistics)
        what = f"{self.calls} dense calls observed, {reached} of {len(self.weights)} linears"
        then = "built from them" if self.estimator else "to be built before the first sparse call"
        return f"calibration: {what} reached; factors {then}"

    def forget(self) -> None:
        """Free the moments."""
        self.moments, self.readers, self.picked = {}, {}, None

    def _reached(self) -> set[str]:
        return {name for names in self.readers.values() for name in names}

    def _report(self, missing: list[str]) -> None:
        if not missing:
            return
        names = shown(missing, quote=False)
        if self.score.prior and not self.score.context:
            raise EstimatorError(
                f"the plan's score looks at the calibration's prior alone, and the dense phase did "
                f"not reach {names}; give a score that looks at the batch too, such as "
                "'strided+prior+weighted', drive the schedule, or pass an estimator"
            )
        if len(missing) == len(self.weights):
            warnings.warn(
                "calibrate='dense_phase', but no dense training call was observed before the first "
                "sparse one, so channels are predicted from a plain SVD of the weights, without "
                "calibration: let the plan start dense (start_step) and drive its schedule "
                "(SparsityCallback, or sparselora_fx.step before each step); on resume, load what "
                "was collected (sparselora_fx.load_calibration)",
                stacklevel=3,
            )
            return
        warnings.warn(
            f"the dense phase did not reach {names}: plain SVDs of these weights are used",
            stacklevel=3,
        )


def _exact(device: torch.device) -> torch.autocast:
    """No autocast: calls of the model, in which all this happens, may be inside the user's."""
    return torch.autocast(device.type, enabled=False)


def first_estimator(
    model: nn.Module,
    given: SVDEstimator | None,
    plan: SparsityPlan,
    frozen: list[FrozenWeight],
    sparsity: Mapping[str, Sparsity],
) -> tuple[SVDEstimator, Collector | None]:
    """The estimator that was given; or one whose factors are still zero, and the collector that
    will make the true one.

    A plan that is sparse from its first step leaves nothing to observe: the paper's estimator then,
    with a warning, and no collector.

    Raises:
        EstimatorError: the plan's rank exceeds every weight.
    """
    if given is not None:
        return given, None
    weights = [w for w in frozen if max(sparsity[w.name]) > 0]
    rank = plan.rank or DEFAULT_RANK
    if not weights:
        return SVDEstimator({}, {}, complete=False), None
    sparse_at_once = sparsity_scale_at(0, 1, plan.start_step, plan.end_step, plan.ramp) > 0
    if sparse_at_once and plan.refresh is None:  # a refresh begins with step 0
        warnings.warn(
            f"calibrate='dense_phase', but start_step={plan.start_step!r} leaves no dense step to "
            "observe, so channels are predicted from a plain SVD of the weights; let the plan "
            "start dense, such as start_step=0.05, or pass an estimator",
            stacklevel=4,
        )
        return SVDEstimator.build(model, rank), None
    ranks = ranks_of(weights, rank)
    alone = _alone(frozen)
    full = {id(w) for w in weights} - {id(w) for w in likely_consumers(weights)}
    blank = SVDEstimator(
        {w.canonical: _zero_factors(w, ranks[w.canonical]) for w in weights},
        {w.canonical: fingerprint_of(w.logical()) for w in weights},
        complete=False,
        statistics={
            w.canonical: _zero_statistics(w, full=id(w) in full) for w in weights if id(w) in alone
        },
    )
    score = blank.score_of(plan.score)
    return blank, Collector({w.name: w for w in weights}, ranks, score)


def _alone(frozen: list[FrozenWeight]) -> set[int]:
    """Ids of the weights that are the only one of their module: what reads its input is known."""
    owned = Counter(id(w.module) for w in frozen)
    return {id(w) for w in frozen if owned[id(w.module)] == 1}


def _zero_factors(w: FrozenWeight, rank: int) -> Factors:
    zeros = partial(torch.zeros, dtype=w.dtype, device=w.weight.device)
    return Factors(zeros(w.out_features, rank), zeros(rank, w.in_features))


def _zero_statistics(w: FrozenWeight, *, full: bool) -> Statistics:
    """What `finish` will give in shape; only the norms are known before."""
    norms = column_norms(w.logical())
    outputs = norms.new_zeros(w.out_features if full else 0)
    inputs = torch.zeros_like(norms)
    return Statistics(outputs, outputs.clone(), inputs, inputs.clone(), norms)
