"""What the passes did to one graph, by the indices of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparselora_fx.compiler.pass_log import PassLog

SPARSE, DENSE, OBSERVED = "sparse", "dense", "observed"  # kinds of graphs


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


@dataclass
class Compilation:
    """One graph that was compiled (or only traced).

    Attributes:
        number: from 1, in the order of compilation.
        kind: "sparse", "dense", or "observed" (dense, and calibration looks on).
        batch: the sizes of the call's tokens, such as "4 x 53"; "" if no argument has two
            dimensions.
        nodes: calls in the graph, after the passes.
        log: what each pass did; nothing for a graph without marked sites.
        seconds: the compiler's, without the trace before it and, in graphs that are not sparse and
            whose sizes are fixed, without the backward, which is compiled when it first runs.
    """

    number: int
    kind: str
    batch: str
    nodes: int
    log: PassLog
    seconds: float = 0.0
