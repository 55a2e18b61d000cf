"""`cost`: what sparse training costs, what it saves, and from which step on it pays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from sparselora_fx.compiler.report import DENSE
from sparselora_fx.errors import CompileError
from sparselora_fx.plan.schedule import sparsity_scale_at
from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.runtime.step_cost import StepFlops, StepTimes, time_steps, traced_flops
from sparselora_fx.runtime.tracing import trace

_PAIRS = 5  # of a dense and a sparse step, timed in turn


@dataclass(frozen=True)
class Cost:
    """The bill of a compiled model, on one batch.

    Attributes:
        flops: of one step; see `StepFlops`.
        times: of one step; None where nothing was timed.
        estimator_seconds: building the estimator took so long in this process.
        compile_seconds: what compiling sparse graphs took; dense ones are compiled without this
            package too.
        watch_seconds: what a watch costs a step, on average (a probe's time over its interval).
        dense_steps: steps that the schedule keeps dense, of ``steps``.
        steps: optimizer steps of the whole run, where known.
        memory_bytes: factors and statistics beside the weights.
        labelled_share: the share of the batch's real tokens that stays dense.
        price_per_hour, watts: what an hour of the machine costs, and what it draws; None: not
            given.
    """

    flops: StepFlops
    times: StepTimes | None
    estimator_seconds: float
    compile_seconds: float
    watch_seconds: float
    dense_steps: int
    steps: int | None
    memory_bytes: int
    labelled_share: float
    price_per_hour: float | None = None
    watts: float | None = None

    @property
    def predicted_ratio(self) -> float:
        """How many times faster a sparse step is, by what it has to do: FLOPs, and on a CPU calls
        of ops, bytes and elements that are unpacked as well."""
        return self.flops.ratio

    @property
    def measured_ratio(self) -> float | None:
        """How many times faster a sparse step was: dense over sparse seconds."""
        return None if self.times is None else self.times.ratio

    @property
    def saved_seconds(self) -> float | None:
        """What a sparse step saves, its share of the watch taken off; None: not timed."""
        if self.times is None:
            return None
        return self.times.dense - self.times.sparse - self.watch_seconds

    @property
    def break_even_steps(self) -> int | None:
        """The step after which the run is ahead of a dense one; None: never, or not timed."""
        saved = self.saved_seconds
        if saved is None or saved <= 0:
            return None
        return self.dense_steps + math.ceil((self.estimator_seconds + self.compile_seconds) / saved)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.flops.sites or not self.flops.sparse_tokens:
            return f"does not pay: {self._why_not()}"
        if self.times is None:
            return (
                f"not timed; a sparse step is predicted to be {self.predicted_ratio:.2f}x as fast "
                "as a dense one"
            )
        after, ratio = self.break_even_steps, self.times.ratio
        if after is None:
            return f"does not pay: {self._why_not()}"
        if self.steps is not None and after > self.steps:
            return (
                f"does not pay in {self.steps} steps: it would after {after}; {ratio:.2f}x from "
                "there"
            )
        return f"pays after {after} steps; {ratio:.2f}x from there"

    def _why_not(self) -> str:
        if self.labelled_share > 0.5:
            return f"{self.labelled_share:.0%} of the batch's tokens carry loss"
        if self.times is None or not self.flops.sites or not self.flops.sparse_tokens:
            return "nothing is sliced; sparselora_fx.explain(model) says why"
        slower = self.times.sparse / self.times.dense
        watch = " with its share of the watch" if self.watch_seconds else ""
        return f"a sparse step takes {slower:.2f}x the time of a dense one{watch}"

    def run(self) -> dict[str, float | None]:
        """Hours, money and kWh of the whole run, sparse and dense; None where something is not
        known: the number of steps, a time, the price or the power."""
        sparse = dense = None
        if self.steps is not None and self.times is not None:
            fixed = self.estimator_seconds + self.compile_seconds
            rest = max(0, self.steps - self.dense_steps)
            late = self.times.sparse + self.watch_seconds
            dense = self.steps * self.times.dense / 3600
            sparse = (fixed + self.dense_steps * self.times.dense + rest * late) / 3600
        found: dict[str, float | None] = {}
        for name, hours in (("sparse", sparse), ("dense", dense)):
            found[f"{name}_hours"] = hours
            found[f"{name}_money"] = _times(hours, self.price_per_hour)
            found[f"{name}_kwh"] = _times(hours, None if self.watts is None else self.watts / 1000)
        return found

    def to_json(self) -> dict[str, object]:
        """``predicted_ratio``, ``measured_ratio``, ``break_even_steps``, ``verdict``, and under
        ``parts`` what they are made of: seconds, steps, bytes, FLOPs; ``run``: see `run`."""
        parts = {
            "estimator_seconds": self.estimator_seconds,
            "compile_seconds": self.compile_seconds,
            "watch_seconds_per_step": self.watch_seconds,
            "dense_steps": self.dense_steps,
            "steps": self.steps,
            "memory_bytes": self.memory_bytes,
            "labelled_share": self.labelled_share,
            "dense_step_seconds": None if self.times is None else self.times.dense,
            "sparse_step_seconds": None if self.times is None else self.times.sparse,
            "saved_seconds_per_step": self.saved_seconds,
            "flops": {**asdict(self.flops), "sparse": self.flops.sparse},
        }
        return {
            "predicted_ratio": self.predicted_ratio,
            "measured_ratio": self.measured_ratio,
            "break_even_steps": self.break_even_steps,
            "verdict": self.verdict,
            "parts": parts,
            "run": self.run(),
        }

    def __str__(self) -> str:
        measured = "not timed" if self.times is None else f"{self.times.ratio:.2f}x"
        lines = [
            f"cost: {self.verdict}",
            f"  step: predicted {self.predicted_ratio:.2f}x, measured {measured}",
            f"  before it pays: estimator {self.estimator_seconds:.1f} s, sparse graphs "
            f"{self.compile_seconds:.1f} s, {self.dense_steps} dense steps; each step: watch "
            f"{self.watch_seconds * 1000:.2f} ms",
            f"  memory: {self.memory_bytes / 2**20:.1f} MiB of factors and statistics",
        ]
        run = self.run()
        for word, unit in (("hours", "hours"), ("money", "in money"), ("kwh", "kWh")):
            sparse, dense = run[f"sparse_{word}"], run[f"dense_{word}"]
            if sparse is not None and dense is not None:
                lines.append(f"  whole run: {sparse:.2f} {unit}, dense {dense:.2f}")
        return "\n".join(lines)


def cost(
    model: nn.Module,
    batch: Mapping[str, object],
    *,
    steps: int | None = None,
    price_per_hour: float | None = None,
    watts: float | None = None,
    measure: bool = True,
) -> Cost:
    """What sparse training of a compiled model costs and saves, told from one batch.

    What is predicted is counted on a trace, which runs nothing. To measure, 6 compiled steps of
    each kind are taken that train nothing: weights, gradients, buffers, random numbers and modes
    are afterwards what they were.

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, as in training, on its device; with labels.
        steps: optimizer steps of the run; None: those that `step` was told, if any.
        price_per_hour: of the machine, in any currency. watts: what the machine draws.
        measure: time steps; else ratios are predictions alone.

    Raises:
        CompileError: the model is not compiled, or a price or power is negative.
    """
    runtime = get_runtime(model)
    check_prices(price_per_hour=price_per_hour, watts=watts)
    flops = traced_flops(trace(runtime, batch))
    times = time_steps(runtime, batch, _PAIRS) if measure else None
    return bill(runtime, flops, times, steps, price_per_hour=price_per_hour, watts=watts)


def check_prices(**prices: float | None) -> None:
    """`CompileError` for the first of some prices that is none."""
    for name, value in prices.items():
        if value is not None and (isinstance(value, str) or not value >= 0):
            raise CompileError(f"{name} is {value!r}; allowed: a number >= 0, or None")


def bill(
    runtime: Runtime,
    flops: StepFlops,
    times: StepTimes | None,
    steps: int | None = None,
    *,
    price_per_hour: float | None = None,
    watts: float | None = None,
) -> Cost:
    """Put together what is known of a run."""
    if steps is None and runtime.step is not None:
        steps = runtime.step[1]
    state = runtime.watching
    probe = state.seconds / len(state.probes) if state is not None and state.probes else 0.0
    real = max(flops.real_tokens, 1)
    built = runtime.collector.estimator if runtime.collector is not None else None
    buffers = runtime.attached.own_buffers()
    return Cost(
        flops,
        times,
        runtime.estimator_seconds + (built.seconds if built is not None else 0.0),
        _compile_seconds(runtime),
        probe / state.every if state is not None else 0.0,
        _dense_steps(runtime, steps),
        steps,
        sum(b.numel() * b.element_size() for b in buffers),
        max(0.0, 1.0 - flops.sparse_tokens / real),
        price_per_hour,
        watts,
    )


def _compile_seconds(runtime: Runtime) -> float:
    """What compiling took that plain ``torch.compile`` does not do."""
    return sum(one.seconds for one in runtime.compilations if one.kind != DENSE)


def _dense_steps(runtime: Runtime, steps: int | None) -> int:
    """The steps that a driven schedule keeps dense."""
    plan = runtime.plan
    if runtime.step is None:
        return 0
    if steps is None:
        return plan.start_step if isinstance(plan.start_step, int) else 0
    if plan.too_short(steps):
        return steps
    schedule = (plan.start_step, plan.end_step, plan.ramp)
    return sum(not sparsity_scale_at(n, steps, *schedule) for n in range(steps))


def _times(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other
