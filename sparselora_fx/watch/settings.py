"""What a user asks of a drift watch."""

from __future__ import annotations

from dataclasses import dataclass

from sparselora_fx.errors import WatchError

MODES = ("observe", "adapt", "stop")
CLIMBING = 50


@dataclass(frozen=True)
class Watch:
    """Compare sparse training with dense training now and then; passed to ``compile(watch=)``.

    A probe takes the first micro-batch of a step that is sparse anyway and runs it dense besides,
    forward only. It compares the two losses, and by region the output that its channels give with
    the output that all channels give, on the same inputs.

    Attributes:
        every: optimizer steps between two probes (calls of the model, where nothing drives the
            schedule); the first sparse step is probed too. A probe takes about as long as a sparse
            step: 1 % of the time by default, less where gradients are accumulated. While an
            automatic plan climbs, at most `CLIMBING` steps pass.
        tolerance: the gap between sparse and dense loss that is borne, in nats per output token.
            Sparse training that fits *better* than the dense model counts as well: the adapters
            then repair the approximation, and the dense model is what is used afterwards.
        mode: "observe" reports (`slx.drift`), and warns once; "adapt" makes the region at fault
            less sparse, and more again when all is quiet, never more than the plan says; "stop"
            raises `DriftError`.
        window: so many latest probes are judged together, by their median.
        samples: context tokens whose outputs are compared, at most.
        quiet: so many probes without drift, one after the other, let a region climb again.

    Raises:
        WatchError: a value out of range.
    """

    every: int = 125
    tolerance: float = 0.02
    mode: str = "observe"
    window: int = 5
    samples: int = 64
    quiet: int = 5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            allowed = ", ".join(map(repr, MODES))
            raise WatchError(f"the watch's mode is {self.mode!r}; allowed: {allowed}")
        for name, least in (("every", 1), ("window", 3), ("samples", 1), ("quiet", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise WatchError(f"the watch's {name} is {value!r}; allowed: an int >= {least}")
        value = self.tolerance
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise WatchError(
                f"the watch's tolerance is {value!r}; allowed: a number of nats above 0, "
                "such as 0.02"
            )
