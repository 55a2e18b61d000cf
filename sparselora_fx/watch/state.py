"""All that a watched model remembers between its steps; what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparselora_fx.errors import WatchError
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.plan.plan import Sparsity, SparsityPlan
from sparselora_fx.watch.judge import Judge
from sparselora_fx.watch.ladder import Ladder
from sparselora_fx.watch.probe import Probe, from_json
from sparselora_fx.watch.settings import CLIMBING, Watch
from sparselora_fx.watch.stages import Stages, stages_of

_VERSION = 1


@dataclass
class WatchState:
    """The history of a watch and where its ladder stands.

    Attributes:
        sites: by region, the frozen linears that belong to it. kinds: "ffn" or "attention".
        last: the step of the latest probe of this process.
        together: the step of the latest probe that several processes agreed on.
        pending: what this process found since.
        seconds: what probes have cost so far.
        norms: by parameter, the norm of its gradient in the probed micro-batch, until it is read.
        handles: hooks that fill ``norms``.
        told: whether an observer has been warned.
        stages: of an automatic plan.
    """

    watch: Watch
    probes: list[Probe] = field(default_factory=list)
    sites: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    last: int | None = None
    together: int | None = None
    pending: Probe | None = None
    seconds: float = 0.0
    norms: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    told: bool = False
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        self.judge = Judge(self.watch)
        self.ladder = Ladder(self.watch.quiet)

    @property
    def every(self) -> int:
        """Steps from one probe to the next, at present."""
        every = self.watch.every
        return min(every, CLIMBING) if self.stages.climbing else every

    def is_due(self, step: int) -> bool:
        """Whether a step (or, undriven, a call) is probed."""
        return self.last is None or step >= self.last + self.every

    def is_due_together(self, step: int) -> bool:
        """Whether all processes are to agree after a step: the same in each of them."""
        return self.together is None or step >= self.together + self.every

    def caps(self) -> dict[str, Sparsity]:
        """By frozen linear, the most that it may skip now; nothing of those that nothing holds
        back."""
        caps, levels = dict(self.stages.now()), self.ladder.levels()
        for name in levels:
            for site in self.sites[name]:
                level = Sparsity(levels[name], levels[name])
                caps[site] = level.scaled(1.0, at_most=caps.get(site))
        return {name: cap for name, cap in caps.items() if min(cap) < 1.0}

    def to_json(self) -> dict[str, object]:
        """What `take` goes on from: plain values."""
        return {
            "version": _VERSION,
            "last": self.last,
            "together": self.together,
            "told": self.told,
            "sites": {name: list(sites) for name, sites in self.sites.items()},
            "kinds": dict(self.kinds),
            "judge": self.judge.to_json(),
            "ladder": self.ladder.to_json(),
            "stages": self.stages.to_json(),
            "probes": [{**p.to_json(), "faults": p.faults} for p in self.probes],
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` wrote. `WatchError` if it is nothing of the kind."""
        try:
            if state["version"] != _VERSION:
                raise KeyError("version")
            probes = []
            for entry in state["probes"]:
                probe = from_json(entry)
                probe.faults = list(entry["faults"])
                probes.append(probe)
            self.judge.take(state["judge"])
            self.ladder.take(state["ladder"])
            self.stages.take(state["stages"])
            self.sites = {name: list(sites) for name, sites in state["sites"].items()}
            self.kinds = dict(state["kinds"])
            self.last, self.together = state["last"], state["together"]
            self.told, self.probes = state["told"], probes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WatchError(
                f"this is no state of a watch ({error!r}); expected what SparsityCallback writes "
                "beside a checkpoint"
            ) from error


def watch_state(
    watch: Watch | None,
    plan: SparsityPlan,
    frozen: list[FrozenWeight],
    sparsity: Mapping[str, Sparsity],
) -> WatchState | None:
    """A new history for what a user asked, or what an automatic plan needs. `WatchError`: it is no
    `Watch`, or one that cannot drive an automatic plan."""
    if watch is not None and not isinstance(watch, Watch):
        raise WatchError(
            f"watch must be a sparselora_fx.Watch, got {type(watch).__name__}; "
            "for example watch=sparselora_fx.Watch(every=50, tolerance=0.02)"
        )
    if plan.max_loss_gap is None:
        return None if watch is None else WatchState(watch)
    watch = watch or Watch(tolerance=plan.max_loss_gap, mode="adapt")
    if watch.mode != "adapt":
        raise WatchError(
            f"the plan's max_loss_gap climbs while a watch is quiet, and this one's mode is "
            f"{watch.mode!r}; pass Watch(mode='adapt'), or leave watch or max_loss_gap out"
        )
    return WatchState(watch, stages=stages_of(frozen, sparsity))
