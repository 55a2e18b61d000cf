"""What a call of a compiled model is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from sparselora_fx.plan.plan import Sparsity

# Makes the compiled call of a step: that call, the same of the model's own forward, its arguments
# by name, and whether tokens enough of it are sparse.
AroundStep = Callable[
    [Callable[[], object], Callable[[], object], Mapping[str, object], bool], object
]


class CallKind(Enum):
    """Who makes a call, and so whether it counts."""

    STEP = "step"  # the user: it follows the schedule, and is counted
    WARM_UP = "warm-up"  # `warm_up` compiles a level of the schedule ahead of need
    TRACE = "trace"  # `explain` and `graphs` trace a batch: nothing runs, its tokens are counted
    MEASUREMENT = "measurement"  # `sensitivity` evaluates with some regions sparse


class BeginsAnew(Exception):
    """A graph that is being traced shows that the call under way was prepared wrongly."""


@dataclass(frozen=True)
class Call:
    """What the next calls of a model are for.

    Attributes:
        level: of a warm-up or a trace: the sparsity scale.
        sparsity: of a measurement: what is sparse, by `FrozenWeight.name`; all else is dense.
    """

    kind: CallKind = CallKind.STEP
    level: float = 0.0
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)

    @property
    def is_step(self) -> bool:
        """Whether it is the user's own call."""
        return self.kind is CallKind.STEP

    @property
    def has_level(self) -> bool:
        """Whether it says itself how sparse it is, whatever the schedule says."""
        return self.kind in (CallKind.WARM_UP, CallKind.TRACE)

    @property
    def is_measurement(self) -> bool:
        """Whether an evaluation may be sparse in it."""
        return self.kind is CallKind.MEASUREMENT
