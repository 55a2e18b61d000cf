"""How far each region may go now: rungs from the plan's sparsity down to dense.

A region that drifts steps down one rung, all others stay. After a grave finding all of them go to
their lowest rung above dense, and climb back together, a rung after each quiet while; one that the
plan asks too much of goes to dense for good. Otherwise, after a quiet while, the region that was
lowered last climbs one rung. If it drifts there again, it comes back and waits twice as long; a
region that has walked down to dense stays there, and so does one that failed twice where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RUNGS = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.0)
FAILURES = 2  # climbs of a region that ended in drift, before it stays where it is
GRAPHS = 12  # ways of being sparse that may be compiled for; then only known ones are taken


@dataclass
class Rung:
    """Where a region stands: ``rungs[at]`` is the most that it may skip."""

    rungs: tuple[float, ...]
    at: int = 0
    failures: int = 0
    climbed: bool = False  # it stands higher than before, and nothing has shown yet that it can
    paused: int | None = None  # where it stood before a grave finding

    @property
    def level(self) -> float:
        return self.rungs[self.at]

    @property
    def settled(self) -> bool:
        """Whether it stays where it is, or below, for good."""
        return self.failures >= FAILURES or self.level == 0.0


@dataclass
class Ladder:
    """The regions of a model, and how they move. Pure: decides levels, sets none."""

    quiet: int
    regions: dict[str, Rung] = field(default_factory=dict)
    lowered: list[str] = field(default_factory=list)  # in the order in which they came down
    calm: int = 0  # probes without drift since the last move
    # The levels that steps have run at: compiled already.
    compiled: list[dict[str, float]] = field(default_factory=list)

    def add(self, planned: Mapping[str, float], start: Mapping[str, float] | None = None) -> None:
        """Make regions known, with the plan's sparsity; ``start``: those that begin lower."""
        for name, level in planned.items():
            if name not in self.regions and level > 0:
                self.regions[name] = Rung((level, *(r for r in RUNGS if r < level)))
                begin = (start or {}).get(name, level)
                self.regions[name].at = _rung_below(self.regions[name].rungs, begin)
        self.note_compiled()

    def levels(self) -> dict[str, float]:
        """The most that each region may skip now."""
        return {name: rung.level for name, rung in self.regions.items()}

    @property
    def moved(self) -> bool:
        """Whether any region may skip less than the plan says."""
        return any(rung.at for rung in self.regions.values())

    def note_compiled(self) -> None:
        """The present levels have run."""
        if self.levels() not in self.compiled:
            self.compiled.append(self.levels())

    def pause(self) -> dict[str, float]:
        """Take every region to its lowest rung above dense; returns those that moved."""
        self.calm = 0
        moved: dict[str, float] = {}
        for name, rung in self.regions.items():
            low = len(rung.rungs) - 2  # the last one is dense
            if rung.at < low:
                rung.paused = rung.at if rung.paused is None else rung.paused
                rung.at, rung.climbed = low, False
                moved[name] = rung.level
        return moved

    def down(self, names: Iterable[str], *, for_good: bool = False) -> dict[str, float]:
        """Lower regions by one rung, or to dense ``for_good``; returns those that moved, with their
        level.

        A rung that is compiled for is taken before the next one that is not: no step waits for the
        compiler.
        """
        self.calm = 0
        moved: dict[str, float] = {}
        for name in names:
            rung = self.regions.get(name)
            if rung is None or rung.level == 0.0:
                continue
            rung.failures += rung.climbed
            rung.climbed = False
            rung.paused = None
            rung.at = len(rung.rungs) - 1 if for_good else self._next(name)
            rung.failures = FAILURES if for_good else rung.failures
            if name in self.lowered:
                self.lowered.remove(name)
            self.lowered.append(name)
            moved[name] = rung.level
        return moved

    def _next(self, name: str) -> int:
        rung = self.regions[name]
        last = len(rung.rungs) - 1
        near = [at for at in (rung.at + 1, rung.at + 2) if at <= last]
        known = [at for at in near if self._known(name, at)]
        if known:
            return known[0]
        return last if self.full else near[0]

    @property
    def full(self) -> bool:
        """Whether no further way of being sparse may be compiled for."""
        return len(self.compiled) >= GRAPHS

    def _known(self, name: str, at: int) -> bool:
        return {**self.levels(), name: self.regions[name].rungs[at]} in self.compiled

    def rest(self) -> dict[str, float]:
        """A probe was calm: after enough of them the region lowered last climbs one rung, or all
        that a grave finding brought down. Returns what moved."""
        self.calm += 1
        if any(rung.paused is not None for rung in self.regions.values()):
            return self._resume() if self.calm >= self.quiet else {}
        name = next((n for n in reversed(self.lowered) if not self.regions[n].settled), None)
        if name is None:
            return {}
        rung = self.regions[name]
        if self.calm < self.quiet * 2**rung.failures:
            return {}
        if self.full and not self._known(name, rung.at - 1):
            return {}
        self.calm = 0
        rung.at -= 1
        rung.climbed = True
        if rung.at == 0:
            self.lowered.remove(name)
        return {name: rung.level}

    def _resume(self) -> dict[str, float]:
        self.calm = 0
        moved: dict[str, float] = {}
        for name, rung in self.regions.items():
            if rung.paused is not None:
                rung.at = rung.paused if self.full else rung.at - 1
                rung.paused = None if rung.at == rung.paused else rung.paused
                moved[name] = rung.level
        return moved

    def to_json(self) -> dict[str, object]:
        """All that later moves depend on."""
        return {
            "regions": {
                name: [list(r.rungs), r.at, r.failures, r.climbed, r.paused]
                for name, r in self.regions.items()
            },
            "lowered": list(self.lowered),
            "calm": self.calm,
            "compiled": [dict(levels) for levels in self.compiled],
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` wrote."""
        self.regions = {
            name: Rung(tuple(rungs), *rest) for name, (rungs, *rest) in state["regions"].items()
        }
        self.lowered, self.calm = list(state["lowered"]), state["calm"]
        self.compiled = [dict(levels) for levels in state["compiled"]]


def _rung_below(rungs: tuple[float, ...], level: float) -> int:
    return next(i for i, rung in enumerate(rungs) if rung <= level)
