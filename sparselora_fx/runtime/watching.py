"""A watched training call: when it is probed, what the probe says, and what follows.

One process acts on a probe at once. Where several train together, each keeps what it found, and
they agree between two steps, in `settle`: a step that is dense or breaks in one of them leaves none
of them waiting.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import SupportsFloat

from torch import Tensor

from sparselora_fx.errors import DriftError, WatchError
from sparselora_fx.ir.token_lists import IGNORED
from sparselora_fx.model.preserve import RandomState
from sparselora_fx.runtime.failing_safe import NotFinite
from sparselora_fx.runtime.probing import Choices, DenseRun, run_dense
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.watching_gradients import read_gradients, watch_gradients
from sparselora_fx.watch.judge import Verdict
from sparselora_fx.watch.probe import Probe, agreed, merged, processes
from sparselora_fx.watch.state import WatchState


def watch_model(runtime: Runtime, state: WatchState | None) -> None:
    """Begin to watch a model; None: it is not watched."""
    runtime.watching = state
    if state is not None:
        runtime.around_step = partial(_watched, runtime, state)
        apply_levels(runtime, state)


def _watched(
    runtime: Runtime,
    state: WatchState,
    sparse: Callable[[], object],
    dense: Callable[[], object],
    arguments: Mapping[str, object],
    is_sparse: bool,
) -> object:
    """One training call, probed if that is due; see `calls.AroundStep`.

    Raises:
        DriftError: the watch is to stop training, and there is drift. NotFinite: see there.
        WatchError: several processes train, and nothing tells them which step it is.
    """
    if runtime.stays_dense or not is_sparse:
        return sparse()
    if runtime.step is None and processes() > 1:
        return _undriven(runtime, sparse)
    settle(runtime)
    step = runtime.calls if runtime.step is None else runtime.step[0]
    due = state.is_due(step)
    if not due and (state.watch.mode == "observe" or not _is_read_at_once(runtime)):
        return sparse()
    before = RandomState.of(arguments.values())
    if not due:
        result = sparse()
        if _is_finite(loss_of(result)):
            return result
        before.put()  # and once more, with the choices recorded
    runtime.speed.leave_out()
    choices = Choices()
    runtime.recorders.append(choices)
    try:
        result = sparse()
    finally:
        runtime.recorders = [other for other in runtime.recorders if other is not choices]
    state.last = step
    dense_loss = _probe(runtime, state, dense, arguments, choices, before, loss_of(result))
    mends = _is_finite(dense_loss) and not _is_finite(loss_of(result))
    if mends and state.watch.mode == "adapt":
        raise NotFinite("the loss of the sparse step is not finite, that of the dense one is")
    return result


def _is_read_at_once(runtime: Runtime) -> bool:
    """Whether a loss can be looked at for nothing. On a GPU the host would wait in every step."""
    return next(runtime.model.parameters()).device.type == "cpu"


def _undriven(runtime: Runtime, sparse: Callable[[], object]) -> object:
    """Processes that do not know which step it is cannot agree. Who asked for a watch is told so;
    an automatic plan stays at its first stage."""
    what = (
        "several processes train a watched model, and nothing tells it which step it is, so they "
        "cannot agree; add sparselora_fx.SparsityCallback() to the Trainer, or call "
        "sparselora_fx.step(model, n, total) before each step, in every process"
    )
    if runtime.plan.max_loss_gap is None:
        raise WatchError(what)
    runtime.notices.warn(f"{what}. Until then nothing is watched, and the plan is not climbed")
    return sparse()


def _probe(
    runtime: Runtime,
    state: WatchState,
    dense: Callable[[], object],
    arguments: Mapping[str, object],
    choices: Choices,
    before: RandomState,
    sparse_loss: Tensor | None,
) -> Tensor | None:
    """Compare a sparse call, which has run, with the dense one; returns the dense loss."""
    begin = time.perf_counter()
    lists = runtime.trace_inputs.tokens
    mask = lists[0] if lists else None
    done = run_dense(runtime, dense, choices, mask, before, state.watch.samples)
    dense_loss, step = loss_of(done.output), state.last or 0
    probe = _compare(step, arguments, sparse_loss, dense_loss, done)
    probe.sliced = {n: (c.kind, list(c.sites)) for n, c in choices.regions.items()}
    _found(runtime, state, merged([probe]))
    watch_gradients(runtime, state)
    state.seconds += time.perf_counter() - begin
    return dense_loss


def _found(runtime: Runtime, state: WatchState, probe: Probe) -> None:
    """Act on what this process found, or keep it until all agree."""
    if processes() == 1:
        act(runtime, state, probe)
    else:
        kept = [] if state.pending is None else [state.pending]
        state.pending = merged([*kept, probe])


def settle(runtime: Runtime, *, between_steps: bool = False) -> None:
    """Judge the gradients of the latest probed micro-batch, if its backward has run. Several
    processes agree on the latest step.

    Args:
        between_steps: no step is under way, in any process: they may wait for each other.
    """
    state = runtime.watching
    if state is None:
        return
    probe = read_gradients(state)
    if probe.faults:
        _found(runtime, state, probe)
    if not between_steps or processes() == 1 or runtime.step is None:
        return
    step = runtime.step[0]
    if runtime.sparsity_scale() > 0 and state.is_due_together(step):
        together, state.pending = agreed(state.pending), None
        if together is not None:
            state.last = state.together = together.step = step
            act(runtime, state, together)


def loss_of(output: object) -> Tensor | None:
    """The loss in a model's output, if there is one."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple | list) and output:
        loss = output[0]
    if loss is None:
        loss = output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _is_finite(loss: Tensor | None) -> bool:
    return loss is None or math.isfinite(float(loss.detach()))


def _compare(
    step: int,
    arguments: Mapping[str, object],
    sparse: Tensor | None,
    dense: Tensor | None,
    done: DenseRun,
) -> Probe:
    """What the two runs show."""
    gap, faults, blamed = None, [], []
    if sparse is not None and dense is not None:
        own, other = float(sparse.detach()), float(dense.detach())
        gap = (own - other) * _share(arguments)
        if not math.isfinite(own):
            where = done.broken_dense or done.broken_sparse or ["no region of the plan"]
            why = "its dense loss is, too" if not math.isfinite(other) else "its dense loss is not"
            faults.append(f"the loss of step {step} is {own} ({why}); first: {where[0]}")
            blamed = list(done.broken_sparse or done.errors) if math.isfinite(other) else []
        elif not math.isfinite(other):
            faults.append(f"the dense loss of step {step} is {other}, the sparse one is finite")
    if done.broken_sparse and not blamed:
        named = ", ".join(done.broken_sparse)
        faults.append(f"what {named} computes is not finite when sparse, and finite when dense")
        blamed = list(done.broken_sparse)
    return Probe(step, gap, dict(done.errors), faults, blamed)


def _share(arguments: Mapping[str, object]) -> float:
    """What turns a loss into nats per output token: transformers divides the sum of a micro-batch
    by the tokens of the whole step, if it is told them."""
    total, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
    if not isinstance(total, SupportsFloat) or not isinstance(labels, Tensor):
        return 1.0
    own = int((labels[..., 1:] != IGNORED).sum())
    return float(total) / max(own, 1)


def _learn(runtime: Runtime, state: WatchState, probe: Probe) -> None:
    """Make regions known that this step has sliced; they may skip what the plan says."""
    planned: dict[str, float] = {}
    for name, (kind, sites) in probe.sliced.items():
        state.sites.setdefault(name, sites)
        state.kinds[name] = kind
        planned[name] = max(runtime.sparsity[site][kind != "ffn"] for site in sites)
    state.ladder.add(planned)


def act(runtime: Runtime, state: WatchState, probe: Probe) -> None:
    """Judge a probe, keep it, and do what the mode says."""
    _learn(runtime, state, probe)
    verdict = state.judge.judge(probe)
    state.probes.append(probe)
    if state.watch.mode == "adapt":
        probe.action = _adapt(runtime, state, verdict)
    elif verdict.text and state.watch.mode == "stop":
        probe.action = f"stopped: {verdict.text}"
        raise DriftError(
            f"training was stopped at step {probe.step}: {verdict.text}. Lower the plan there, "
            'let the watch do it (Watch(mode="adapt")), or raise its tolerance '
            f"({state.watch.tolerance:g} nats a token)"
        )
    elif verdict.text and not state.told:
        state.told = True
        warnings.warn(
            f"sparse training drifts from dense training at step {probe.step}: {verdict.text}. "
            'sparselora_fx.drift(model) has the history; Watch(mode="adapt") would act on it',
            stacklevel=2,
        )


def _adapt(runtime: Runtime, state: WatchState, verdict: Verdict) -> str | None:
    ladder, stages = state.ladder, state.stages
    if not verdict.text and not verdict.calm:
        ladder.calm = 0
        return None
    if verdict.text and not verdict.broken and stages.retreat():
        return _moved(runtime, state, "down", {}, stages.describe(), verdict.text)
    if verdict.text and not verdict.regions:
        return f"none: {verdict.text}"
    if verdict.text:
        moved = ladder.pause() if verdict.grave else {}
        moved |= ladder.down(verdict.unfit, for_good=True)
        moved = moved or ladder.down(verdict.regions, for_good=verdict.broken)
    else:
        moved = ladder.rest()
    if verdict.text and not moved:
        return f"none, all are as low as they go: {verdict.text}"
    if not moved and ladder.calm < state.watch.quiet:
        return None
    if not moved and not stages.climb():
        return None
    levels = ", ".join(f"{name} to {level:g}" for name, level in moved.items())
    way = "down" if verdict.text else "up"
    return _moved(runtime, state, way, moved, levels or stages.describe(), verdict.text or "quiet")


def _moved(
    runtime: Runtime,
    state: WatchState,
    way: str,
    regions: Mapping[str, float],
    what: str,
    why: str,
) -> str:
    """Let other levels hold from the next call on; what was measured before says nothing of
    them."""
    state.ladder.calm = 0
    state.judge.forget(list(regions))
    apply_levels(runtime, state)
    if regions and not any(state.ladder.levels().values()):
        runtime.notices.warn(
            f"no region is sparse any more, and training goes on dense: {why}. To be sparse again, "
            "mend that and compile anew, with an estimator built from the data and adapters of now",
            about="watch",
        )
    return f"{way}: {what} ({why})"


def apply_levels(runtime: Runtime, state: WatchState) -> None:
    """Let the levels of a watch hold, if any of them is below the plan's."""
    if state.ladder.moved or state.stages.caps:
        runtime.cap(state.caps())
