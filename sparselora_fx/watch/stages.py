"""The staged start of an automatic plan: deep feed-forwards first, attention last.

What a cautious operator would do by hand: begin where the approximation was found to do the least
harm, watch, and go on from there only while all is quiet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparselora_fx.model.blocks import block_positions
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.plan.plan import Sparsity

_DEEP = (2 / 3, 1 / 2, 0.0)  # from which depth on feed-forwards are sparse, stage by stage
_OPEN, _CLOSED = 1.0, 0.0


@dataclass
class Stages:
    """Caps by stage, each a superset of the one before; the last allows all of the plan.

    Attributes:
        caps: by stage, by frozen linear, the most that it may skip.
        at: the present stage.
        proven: a quiet while has passed in it.
        ended: a stage drifted as soon as it was entered; there is no further climb.
    """

    caps: list[dict[str, Sparsity]] = field(default_factory=list)
    at: int = 0
    proven: bool = False
    ended: bool = False

    def now(self) -> dict[str, Sparsity]:
        """The caps of the present stage; none without stages, and in one that allows all."""
        return self.caps[self.at] if self.caps else {}

    @property
    def climbing(self) -> bool:
        """Whether a further stage may come."""
        return not self.ended and self.at + 1 < len(self.caps)

    def climb(self) -> bool:
        """After a quiet while: on to the next stage, if there is one. Returns whether it did."""
        self.proven = True
        if not self.climbing:
            return False
        self.at, self.proven = self.at + 1, False
        return True

    def retreat(self) -> bool:
        """Drift: back by a stage if this one has not proven itself, and stay there. Returns whether
        it did."""
        if self.proven or self.at == 0:
            return False
        self.at, self.proven, self.ended = self.at - 1, True, True
        return True

    def describe(self) -> str:
        """Words for an action."""
        return f"stage {self.at + 1} of {len(self.caps)}"

    def to_json(self) -> dict[str, object]:
        """All that later moves depend on; the caps follow from the model."""
        return {"at": self.at, "proven": self.proven, "ended": self.ended}

    def take(self, state: Mapping[str, object]) -> None:
        """Go on from what `to_json` wrote."""
        at, proven, ended = state["at"], state["proven"], state["ended"]
        if not (isinstance(at, int) and isinstance(proven, bool) and isinstance(ended, bool)):
            raise TypeError(f"got {dict(state)}")
        self.at, self.proven, self.ended = at, proven, ended


def stages_of(frozen: list[FrozenWeight], sparsity: Mapping[str, Sparsity]) -> Stages:
    """The stages of a model: feed-forwards of its last third, of its last half, of all blocks that
    the plan names, and then attention. Stages that add nothing are left out."""
    places = block_positions(frozen)
    found: list[dict[str, Sparsity]] = []
    for start in _DEEP:
        caps = {}
        for weight in frozen:
            position, count = places.get(weight.name, (0, 1))
            opened = position >= start * count
            caps[weight.name] = Sparsity(_OPEN if opened else _CLOSED, _CLOSED)
        found.append(caps)
    found.append({weight.name: Sparsity(_OPEN, _OPEN) for weight in frozen})
    distinct: list[dict[str, Sparsity]] = []
    seen: list[dict[str, Sparsity]] = []
    for caps in found:
        allowed = {n: sparsity[n].scaled(1.0, at_most=cap) for n, cap in caps.items()}
        if allowed not in seen and any(max(own) > 0 for own in allowed.values()):
            seen.append(allowed)
            distinct.append({} if allowed == sparsity else caps)
    return Stages(distinct)
