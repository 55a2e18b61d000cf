"""When a window of probes shows drift, and which region is at fault."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from sparselora_fx.watch.probe import Probe
from sparselora_fx.watch.settings import Watch

LEAST = 3  # probes, before anything but a fault is judged: one batch proves nothing
RECENT = 3  # probes that make up "now" for a region
# A region has drifted when its error is so many times what it was just before (a fault), or what it
# was at first: adapters that learn change what flows through a region, and its error with it.
JUMP, RISE = 1.2, 1.75
BEFORE = 2  # windows that make up "just before"
SPREADS = 4.0  # and so many spreads between batches above that: some regions are noisy, others not
ERRORS = 3.0  # a gap is beyond the tolerance by so many standard errors of its median
TWICE, GRAVE = 2.0, 5.0  # tolerances: each gap of a window beyond so many; their median
_HISTORY = 4  # windows that tell how much a gap or an error differs from batch to batch
_CLIP = 5.0  # one wild batch counts as a difference of so many usual ones
_MEDIAN = 1.2533  # standard error of a median, in standard deviations over sqrt(n)


@dataclass(frozen=True)
class Verdict:
    """What the latest probes say: nothing (``text`` is ""), or drift.

    Attributes:
        text: what was found, for people.
        regions: those at fault, worst first; empty where no region can be blamed.
        grave: an error has jumped (the estimator, the data or the pace of training is another), or
            the gap is many times the tolerance: one rung down would not do.
        unfit: regions that the plan asks too much of: the gap is many times the tolerance, and no
            error has risen.
        broken: a fault, not a drift: no window is waited for.
        calm: every measure is at half its bound or less: a climb may be tried.
    """

    text: str = ""
    regions: tuple[str, ...] = ()
    grave: bool = False
    unfit: tuple[str, ...] = ()
    broken: bool = False
    calm: bool = False


@dataclass
class Judge:
    """Remembers what was measured at the present sparsity, and judges it.

    ``errors`` are the errors by region and ``gaps`` the loss gaps, oldest first, since what they
    depend on was changed last; of a region's, the first window and the last ones are kept. The
    bounds were chosen on nine runs of the shipped model without a fault and eleven with one
    (docs/operations.md); runs with other seeds test them.
    """

    watch: Watch
    gaps: list[float] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)

    def judge(self, probe: Probe) -> Verdict:
        """Take one more probe in."""
        if probe.faults:
            return Verdict("; ".join(probe.faults), tuple(probe.blamed), broken=True)
        if probe.loss_gap is not None:
            self.gaps = [*self.gaps, probe.loss_gap][-_HISTORY * self.watch.window :]
        window = self.watch.window
        last = _HISTORY * window + RECENT
        for name, error in probe.regions.items():
            seen = [*self.errors.get(name, []), error]
            fits = len(seen) <= window + last
            self.errors[name] = seen if fits else seen[:window] + seen[-last:]
        return self._of_gap(probe.regions) or self._of_regions() or Verdict(calm=self._calm())

    def forget(self, regions: Sequence[str] = ()) -> None:
        """Begin anew: these regions are sparse in another way, so the loss gap is another too."""
        self.gaps = []
        for name in regions:
            self.errors.pop(name, None)

    def _of_gap(self, errors: Mapping[str, float]) -> Verdict | None:
        if len(self.gaps) < LEAST:
            return None
        latest = self.gaps[-self.watch.window :]
        middle = median(latest)
        noise = ERRORS * _MEDIAN * _spread(self.gaps) / math.sqrt(len(latest))
        bound = self.watch.tolerance
        clear = len(latest) == self.watch.window and (
            min(latest) > TWICE * bound or max(latest) < -TWICE * bound
        )
        if not clear and abs(middle) - noise <= bound:
            return None
        culprit = self._culprit(errors)
        side = "above" if middle > 0 else "below"
        named = f"; {culprit} differs most" if culprit else ""
        grave, regions = abs(middle) > GRAVE * bound, (culprit,) if culprit else ()
        return Verdict(
            f"the sparse loss is {abs(middle):.4f} nats a token {side} the dense loss (median of "
            f"{len(latest)} probes, +- {noise:.4f}; tolerance {self.watch.tolerance:g}){named}",
            regions,
            grave=grave,
            unfit=tuple(name for name in regions if grave and self._rise(name) <= 1),
        )

    def _of_regions(self) -> Verdict | None:
        found = [(self._rise(name), name) for name in self.errors]
        drifted = sorted(((rise, name) for rise, name in found if rise > 1), reverse=True)
        if not drifted:
            return None
        texts = [
            f"{name} is off by {median(self.errors[name][-RECENT:]):.3f} of its output, "
            f"{self._first(name):.3f} at first"
            for _, name in drifted
        ]
        names = tuple(name for _, name in drifted)
        return Verdict("; ".join(texts), names, any(self._jump(name) > 1 for name in names))

    def _first(self, name: str) -> float:
        return median(self.errors[name][: self.watch.window])

    def _rise(self, name: str) -> float:
        """A region's error now over what it may be, given what it was just before, and at first."""
        return max(self._jump(name), self._over(name, self._first(name), RISE))

    def _jump(self, name: str) -> float:
        """A region's error now over what it may be, given what it was just before."""
        before = self.errors[name][:-RECENT][-BEFORE * self.watch.window :]
        return self._over(name, median(before), JUMP) if before else 0.0

    def _over(self, name: str, error: float, times: float) -> float:
        """A region's error now over what it may be, given an earlier one and the noise."""
        seen, window = self.errors[name], self.watch.window
        if len(seen) < window + LEAST:
            return 0.0
        allowed = error + SPREADS * _spread(seen[:-RECENT][-_HISTORY * window :])
        return median(seen[-RECENT:]) / (max(times * error, allowed) or math.inf)

    def _culprit(self, errors: Mapping[str, float]) -> str | None:
        """The region whose error has risen most; while nothing has risen, the largest error."""
        risen = max(errors, key=self._rise, default=None)
        if risen is not None and self._rise(risen) > 1:
            return risen
        return max(errors, key=lambda name: errors[name], default=None)

    def _calm(self) -> bool:
        if len(self.gaps) < LEAST and self.gaps:
            return False
        gap = abs(median(self.gaps[-self.watch.window :])) if self.gaps else 0.0
        return gap <= self.watch.tolerance / 2

    def to_json(self) -> dict[str, object]:
        """All that later verdicts depend on."""
        return {"gaps": list(self.gaps), "errors": {n: list(e) for n, e in self.errors.items()}}

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` wrote."""
        self.gaps = list(state["gaps"])
        self.errors = {name: list(errors) for name, errors in state["errors"].items()}


def _spread(values: Sequence[float]) -> float:
    """The standard deviation between batches, from differences of neighbours (J. von Neumann, Ann.
    Math. Stat. 12, 1941): a drift of their mean does not pass for noise."""
    steps = [abs(after - before) for before, after in pairwise(values)]
    most = _CLIP * median(steps)
    return math.sqrt(sum(min(step, most) ** 2 for step in steps) / (2 * len(steps)))
