"""What became of each frozen weight, as the graphs that ran told it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sparselora_fx._torch import in_backward
from sparselora_fx.compiler.report import GraphReport, SiteReport

NameOf = Callable[[object], str | None]


@dataclass
class SiteOutcome:
    """What became of one frozen weight in one call of the model.

    A block that is applied several times uses a weight several times, each time with a choice of
    its own. ``report``, ``region`` and ``kept`` are those of the first use that is sliced (of the
    first one, if none is).
    """

    report: SiteReport
    region: str = ""  # its module's name
    kind: str = ""  # "ffn" or "attention"
    kept: str = ""
    sliced: int = 0  # uses that are sliced
    dense: list[str] = field(default_factory=list)  # why others are not, one reason for each use
    call: int = 0  # the call of the model in which the graph ran first

    def add(self, other: SiteOutcome) -> None:
        """Take over a further use."""
        if other.sliced and not self.sliced:
            self.report, self.region = other.report, other.region
            self.kind, self.kept = other.kind, other.kept
        self.sliced += other.sliced
        self.dense += other.dense


def note_outcomes(
    seen: dict[str, SiteOutcome],
    report: GraphReport,
    args: tuple[object, ...],
    name_of: NameOf,
    call: int,
) -> None:
    """Note what a graph did to the weights it was called with: it replaces what an earlier call
    noted of them, and adds to what the same call did."""
    found: dict[str, SiteOutcome] = {}
    for name, use in _uses(report, args, name_of):
        if name in found:
            found[name].add(use)
        else:
            use.call = call
            found[name] = use
    for name, new in found.items():
        old = seen.get(name)
        if old is None or old.call != call:
            seen[name] = new
        elif not in_backward():  # a backward runs a checkpointed block again: no further use
            old.add(new)


def _uses(
    report: GraphReport, args: tuple[object, ...], name_of: NameOf
) -> list[tuple[str, SiteOutcome]]:
    uses = []
    for region in report.regions:
        names = [name_of(args[site.weight]) for site in region.sites]
        where = common_module([name for name in names if name is not None])
        kept = ", ".join(f"{k} of {n}" for _, k, n in region.choices.values())
        for name, site in zip(names, region.sites, strict=True):
            if name is not None:
                uses.append((name, SiteOutcome(site, where, region.kind, kept, sliced=1)))
    for site in report.dense:
        name = name_of(args[site.weight])
        if name is not None:
            uses.append((name, SiteOutcome(site, dense=[site.reason])))
    return uses


def numbered(name: str, taken: Mapping[str, object]) -> str:
    """A name that is not taken: itself, or with ``#2``, ``#3``, ... behind it."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def common_module(names: list[str]) -> str:
    """The deepest module that holds all the named modules (a single module's own name, if there is
    one)."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) != 1:
            break
        shared.append(column[0])
    return ".".join(shared)
