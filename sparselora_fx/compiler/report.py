"""What the passes did to one graph, by the indices of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteReport:
    """What became of one frozen weight. ``weight`` is the index of the graph input that holds it.

    ``role`` is "out" (rows kept), "in" (columns kept) or "dense"; ``rows`` is the index among the
    graph's extra outputs.
    """

    weight: int
    role: str
    reason: str = ""
    rows: int | None = None


@dataclass(frozen=True)
class RegionReport:
    """What became of one region: its kind, its sites, and per choice ``name -> (extra output, k,
    N)``."""

    kind: str
    sites: list[SiteReport]
    choices: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class ObservedReport:
    """An input that is observed: the graph inputs that hold the weights reading it, and the extra
    outputs that hold its rows and (if only the graph knows them) their indices."""

    weights: tuple[int, ...]
    kn: tuple[bool | None, ...]  # as `Observed.kn`
    rows: int
    taken: int | None


@dataclass(frozen=True)
class GraphReport:
    """Everything the passes did to one graph. ``extra`` outputs follow the graph's own; ``inputs``
    are the places that those which are left had among the inputs of the traced graph."""

    regions: list[RegionReport]
    dense: list[SiteReport]
    counts: dict[str, int]
    extra: int
    observed: list[ObservedReport]
    inputs: list[int]

    def passed(self, args: Sequence[object]) -> tuple[object, ...]:
        """What a call of the traced graph passes to this one. Dynamo leaves out itself what is no
        input any more."""
        if len(args) == len(self.inputs):
            return tuple(args)
        return tuple(args[place] for place in self.inputs)
