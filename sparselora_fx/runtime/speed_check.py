"""Is a sparse step faster than a dense one? Asked of the user's own steps, at the switch to sparse.

No step is run for it: of the steps that the schedule makes sparse, a few run dense in turn with
sparse ones, in the order dense sparse, sparse dense, dense sparse, ... A call is timed from its
start to the end of its backward, per token; what counts is the median of sparse over dense among
neighbours. Steps in which something is compiled or captured do not count, nor does the next one of
their kind. Nothing waits for the device: CUDA events are read once they have passed.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sparselora_fx.runtime.backward_hooks import on_backward
from sparselora_fx.runtime.timer import Moment, Timer

FEW, MOST = 3, 7  # pairs: three that agree are enough, after seven the median decides
DENSE_STEPS = 12  # at most, with those that do not count
STEPS = 60  # at most, of both kinds
_SETTLING = 48  # sparse steps at most, until CUDA graphs of them are replayed


@dataclass(frozen=True)
class Verdict:
    """What was measured: the median of sparse over dense time among ``pairs`` neighbours, and a
    step of each kind in milliseconds, forward and backward, on ``device``."""

    ratio: float
    pairs: int
    sparse_ms: float
    dense_ms: float
    device: str

    @property
    def pays(self) -> bool:
        """Whether sparse steps are faster."""
        return self.ratio < 1.0

    def __str__(self) -> str:
        return (
            f"a sparse step takes {self.ratio:.2f} of a dense one ({self.sparse_ms:.3g} ms against "
            f"{self.dense_ms:.3g} ms, forward and backward on {self.device}, median of "
            f"{self.pairs} pairs)"
        )

    def advice(self) -> str:
        """The one warning that sparse steps are not faster."""
        return (
            f"sparse steps are not faster here: {self}. Training stays DENSE, as under "
            "torch.compile alone. What to do: larger batches or longer sequences, a higher "
            "sparsity, fewer sparse layers in the plan, or trim_logits=True; "
            "sparselora_fx.compile(..., verify_speed=False) trains sparse all the same"
        )


@dataclass
class _Step:
    """One step that the schedule makes sparse: all calls of an optimizer step."""

    number: int | None
    dense: bool
    rows: int = 0  # tokens of its calls
    waiting: int = 0  # calls whose backward has not ended
    spans: list[tuple[Moment, Moment]] = field(default_factory=list)  # start and end of each call
    worked: bool = False  # something was compiled or captured in it
    replayed: bool = False  # a CUDA graph was replayed in it

    @property
    def usable(self) -> bool:
        return bool(self.spans) and not self.waiting and not self.worked


@dataclass
class _Call:
    """Where a call began: the time, and what had been compiled and replayed before."""

    start: Moment
    work: int
    replays: int


class SpeedCheck:
    """The question, asked of one compiled model.

    Attributes:
        wanted: as ``compile(verify_speed=)``.
        verdict: once there is one.
        over: nothing is timed any more.
    """

    def __init__(self, wanted: bool | None, counters: Callable[[], tuple[int, int]]) -> None:
        """``counters``: how many graphs were compiled and captured, and how many replayed."""
        self.wanted = wanted
        self.counters = counters
        self.verdict: Verdict | None = None
        self.over = wanted is False
        self.timer: Timer | None = None
        self.began = False  # a sparse step has run as all later ones will
        self.pairs: list[tuple[_Step, _Step]] = []  # dense, sparse
        self.half: _Step | None = None  # of a pair
        self.step: _Step | None = None  # under way
        self.asked = False  # of the present call
        self.cold = {True: False, False: False}  # by density: the next step does not count
        self.steps = self.dense_steps = 0

    @property
    def stays_dense(self) -> bool:
        """Whether training is dense because sparse steps are not faster."""
        return self.verdict is not None and not self.verdict.pays

    def begin(self, device: torch.device) -> _Call | None:
        """A training call begins."""
        self.asked = False
        if self.over:
            return None
        self.timer = self.timer or Timer.of(device)
        if self.timer is None:
            self.over = True
            return None
        return _Call(self.timer.now(), *self.counters())

    def runs_dense(self, number: int | None, *, captures: bool) -> bool:
        """Whether a call that the schedule makes sparse is to run dense, to be timed.

        Args:
            number: its optimizer step, all calls of which run alike; None: each call is a step.
            captures: steps are to be replayed as CUDA graphs.
        """
        if self.over:
            return False
        if self.step is None or number is None or self.step.number != number:
            self._end_step(captures)
            self.step = _Step(number, not self.over and self.began and self._next_is_dense())
            self.steps += 1
            self.dense_steps += self.step.dense
        self.asked = not self.over
        return self.step.dense

    def leave_out(self) -> None:
        """The present call is not timed: it does more than a step's calls do."""
        self.asked = False

    def watch(self, call: _Call | None, result: object, rows: int) -> None:
        """Time a call whose forward is done until its backward has ended.

        Args:
            result: what the model returns.
            rows: tokens of the call.
        """
        step, timer = self.step, self.timer
        if call is None or not self.asked or step is None or timer is None:
            return
        step.rows += rows
        step.waiting += 1

        def end() -> None:
            work, replays = self.counters()
            step.spans.append((call.start, timer.now()))
            step.waiting -= 1
            step.worked |= work > call.work
            step.replayed |= replays > call.replays

        on_backward(result, end)

    def _next_is_dense(self) -> bool:
        if self.half is not None:
            return not self.half.dense
        return len(self.pairs) % 2 == 0

    def _end_step(self, captures: bool) -> None:
        """Count the step that is over, and judge if enough is known."""
        step, self.step = self.step, None
        if step is None:
            return
        cold, self.cold[step.dense] = self.cold[step.dense], step.worked
        if not self.began:
            settled = not captures or step.replayed or self.steps >= _SETTLING
            self.began = step.usable and settled
            self.steps = 0 if self.began else self.steps
        elif step.usable and not cold:
            self._pair(step)
        self._judge()
        self.over |= self.dense_steps >= DENSE_STEPS or self.steps >= STEPS

    def _pair(self, step: _Step) -> None:
        half, self.half = self.half, None
        if half is None:
            self.half = step
        else:
            self.pairs.append((half, step) if half.dense else (step, half))

    def _judge(self) -> None:
        timer = self.timer
        spans = [span for pair in self.pairs for step in pair for span in step.spans]
        if len(self.pairs) < FEW or timer is None or not all(timer.passed(e) for _, e in spans):
            return
        times = [[_ms(step, timer) for step in pair] for pair in self.pairs]
        sizes = [[max(step.rows, 1) for step in pair] for pair in self.pairs]
        ratios = [
            (sparse / s) / (dense / d) for (dense, sparse), (d, s) in zip(times, sizes, strict=True)
        ]
        if len(ratios) < MOST and len({ratio < 1.0 for ratio in ratios}) > 1:
            return
        dense_ms, sparse_ms = map(statistics.median, zip(*times, strict=True))
        ratio = statistics.median(ratios)
        self.verdict = Verdict(ratio, len(ratios), sparse_ms, dense_ms, timer.name)
        self.over, self.pairs, self.half = True, [], None

    def describe(self) -> str:
        """One line for `explain`; empty before the verdict."""
        if self.verdict is None:
            return ""
        return f"speed: {self.verdict}" + ("; training stays dense" if self.stays_dense else "")

    def save(self, path: Path) -> None:
        """Write the verdict, if there is one."""
        if self.verdict is not None:
            path.write_text(json.dumps(asdict(self.verdict)) + "\n", encoding="utf-8")

    def load(self, path: Path, device: torch.device) -> None:
        """Take over a verdict of an earlier run on such a device. Without one, and with a warning
        if the file is damaged, speed is measured anew."""
        if self.wanted is False or not path.is_file():
            return
        try:
            verdict = Verdict(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            warnings.warn(
                f"{str(path)!r} is damaged ({error}); whether sparse steps are faster is measured "
                "again in this run's first sparse steps",
                stacklevel=2,
            )
            return
        timer = Timer.of(device)
        if timer is not None and timer.name == verdict.device:
            self.verdict, self.over = verdict, True


def _ms(step: _Step, timer: Timer) -> float:
    return sum(timer.elapsed_ms(start, end) for start, end in step.spans)
