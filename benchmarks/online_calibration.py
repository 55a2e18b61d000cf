"""What calibrating in the dense phase costs, and how good the channels are that come of it.

    python -m benchmarks.online_calibration --json F [--parts cost quality drift] [--seeds
    0 1 2]

What is measured replaces what the file says of the same part and seed.

**Cost.** Two models of one preset in their dense phase, with and without observing, take turns,
A B A B. ``ratio`` is the median over pairs of the time with over the time without, on the processor
time of this process (which a busy machine disturbs least) and on the wall; ``spread`` are the
quartiles. ``pause_s`` is what the switch takes, ``moments_mib`` what is held until then.

**Quality.** The shipped model is fine-tuned densely for some steps, and the feed-forward regions
then choose channels for test problems: with the factors of that dense phase, with those of an
offline calibration on 8 batches made before training, and with plain SVDs. Reported: the mean
overlap with the true top k.

**Drift.** The same after sparse training (all tokens, feed-forward regions at 0.9) that began with
a dense phase of 5 steps, without refreshes and with one every 20 steps; and the mean loss of the
last ten steps, all of them sparse.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparselora_fx as slx
from benchmarks.support import measuring
from benchmarks.support.overlap import overlaps
from benchmarks.support.peers import dense, random_estimator
from benchmarks.support.presets import PRESETS, Preset
from benchmarks.track_adapter import RANK, batches_of, load
from sparselora_fx.estimator.online import Collector
from sparselora_fx.estimator.sample_rows import ROWS
from sparselora_fx.runtime.runtime import get_runtime

_LATE = 10**6  # a start_step that no run here reaches


def collector_of(model: nn.Module) -> Collector:
    """What a compiled model collects."""
    found = get_runtime(model).collector
    assert found is not None
    return found


def held_bytes(collector: Collector) -> int:
    """Bytes of the moments."""
    parts = ("norms", "share", "shift", "total", "second")
    return sum(getattr(m, p).nbytes for m in collector.moments.values() for p in parts)


def cost(preset: Preset, pairs: int, backend: str = "inductor") -> dict[str, Any]:
    """Time and memory of observing."""
    levels = {"sparsity": preset.plan().sparsity, "tokens": "context", "start_step": _LATE}
    without = dense(preset)
    observing = dense(preset, without)
    plans = slx.SparsityPlan(**levels), slx.SparsityPlan(**levels, calibrate="dense_phase")
    slx.compile(without, random_estimator(without), plan=plans[0], backend=backend)
    slx.compile(observing, plan=plans[1], backend=backend)
    batches = preset.batches()
    running = {"without": _Runner(without), "observing": _Runner(observing)}
    for turn in range(pairs + 3):
        for runner in running.values():
            runner.step(batches[turn % len(batches)], keep=turn >= 3)
    collector = collector_of(observing)
    held = held_bytes(collector)
    start = time.perf_counter()
    collector.build()
    pause = time.perf_counter() - start
    found: dict[str, Any] = {"preset": preset.name, "pairs": pairs, "rows_per_input": ROWS}
    for place, clock in enumerate(("cpu", "wall")):
        timed = zip(running["observing"].times, running["without"].times, strict=True)
        ratios = [with_it[place] / alone[place] for with_it, alone in timed]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[f"ratio_{clock}"] = round(middle, 4)
        found[f"spread_{clock}"] = [round(low, 4), round(high, 4)]
    step = statistics.median(times[0] for times in running["without"].times)
    found |= {"step_cpu_s": round(step, 4), "pause_s": round(pause, 3)}
    return found | {"moments_mib": round(held / 2**20, 2)}


class _Runner:
    """A model that trains, and the processor and wall time of its steps in seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        self.times: list[tuple[float, float]] = []

    def step(self, batch: dict[str, Any], *, keep: bool) -> None:
        slx.step(self.model, 0)
        before = measuring.now("cpu"), measuring.now("wall")
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        after = measuring.now("cpu"), measuring.now("wall")
        if keep:
            self.times.append((after[0] - before[0], after[1] - before[1]))


def fine_tune(model: nn.Module, batches: list[dict[str, Any]], rate: float) -> list[float]:
    """AdamW steps as the compiled plan says, one per batch; their losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for n, batch in enumerate(batches):
        slx.step(model, n)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    slx.step(model, len(batches))
    return losses


def regions_of(model: nn.Module) -> dict[str, float]:
    """Every feed-forward region at 0.9."""
    return {f"layers.{i}.mlp": 0.9 for i in range(model.config.num_hidden_layers)}


def drift(steps: int, seed: int, rate: float) -> list[dict[str, Any]]:
    """Overlap and loss after sparse training, with and without refreshes."""
    rows = []
    training = batches_of("train", steps, 16, seed)
    (test,) = batches_of("test", 1, 32, seed)
    for refresh in (None, 20):
        model = load(seed)
        plan = slx.SparsityPlan(
            regions_of(model), tokens="all", start_step=5, rank=RANK,
            calibrate="dense_phase", refresh=refresh,
        )  # fmt: skip
        slx.compile(model, plan=plan, backend="eager")
        losses = fine_tune(model, training, rate)
        slx.step(model, steps + 1)  # sparse also where `steps` is a refresh
        row = _row(model, test, "dense phase")
        row |= {"refresh": refresh, "loss": round(statistics.mean(losses[-10:]), 4)}
        rows.append({"steps": steps, "seed": seed, **row})
        slx.restore(model)
        torch.compiler.reset()
    return rows


def quality(steps: int, seed: int, rate: float) -> list[dict[str, Any]]:
    """Overlap after a dense phase of some steps of 16 problems each."""
    model = load(seed)
    training = batches_of("train", max(steps, 8), 16, seed)
    (test,) = batches_of("test", 1, 32, seed)
    regions = regions_of(model)
    offline = slx.SVDEstimator.build(model, RANK, calibration=training[:8], progress=False)
    plain = slx.SVDEstimator.build(model, RANK, progress=False)
    plan = slx.SparsityPlan(
        regions, tokens="all", start_step=steps, rank=RANK, calibrate="dense_phase"
    )
    slx.compile(model, plan=plan, backend="eager")
    fine_tune(model, training[:steps], rate)
    rows = [_row(model, test, "dense phase")]
    known = (("offline calibration", offline, None), ("plain SVD, pooled", plain, "pooled"))
    for name, estimator, score in known:
        late = slx.SparsityPlan(regions, tokens="all", start_step=0, score=score)
        slx.compile(model, estimator, plan=late, backend="eager")
        rows.append(_row(model, test, name))
    slx.restore(model)
    torch.compiler.reset()
    return [{"dense_steps": steps, "seed": seed, **row} for row in rows]


def _row(model: nn.Module, test: dict[str, Any], name: str) -> dict[str, Any]:
    found = overlaps(model, test).values()
    row = {"estimator": name, "s": 0.9, "overlap": statistics.mean(o.found for o in found)}
    row |= {"chance": statistics.mean(o.chance for o in found)}
    print(row, flush=True)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "cost": lambda args: cost(PRESETS[args.preset], args.pairs),
    "quality": lambda args: [
        row for n in (5, 20) for seed in args.seeds for row in quality(n, seed, args.rate)
    ],
    "drift": lambda args: [
        row for seed in args.seeds for row in drift(args.steps, seed, args.rate)
    ],
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-small")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="of the training in 'drift'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for part in args.parts:
        rows = PARTS[part](args)
        if isinstance(rows, list):
            kept = [row for row in found.get(part, []) if row["seed"] not in args.seeds]
            rows = kept + rows
        found[part] = rows
        print(part, rows, flush=True)
        found |= {"machine": measuring.machine("cpu"), "versions": measuring.versions()}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
