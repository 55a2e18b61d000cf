"""Does the choice of channels show in the fine-tuning loss? The shipped model, equal steps.

    python -m benchmarks.quality_loss --json benchmarks/results/estimator_quality_loss.json

Every run starts from the same adapters (per seed), sees the same batches in the same order, skips
the same share of the channels of all feed-forward regions but the first, and is judged by the dense
model's loss on the answers of wordings that training has never shown. ``tokens``: "context" as by
default, "all" as a stress, where tokens that carry loss are sparse too. A run that the file already
holds is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import sparselora_fx as slx
from benchmarks.demo.models import MODEL, RANK, load_model
from benchmarks.demo.scoring import test_loss as answer_loss
from benchmarks.sensitivity import POLICY, about, train
from benchmarks.support.activations import calibration_batches
from benchmarks.support.random_factors import noise
from benchmarks.track_adapter import batches_of
from sparselora_fx.plan.score import DEFAULT_CALIBRATED

SPARSITIES = (0.9, 0.97)
STRESS = 0.9  # with every token sparse
VARIANTS = (
    ("svd", "pooled"),
    ("calibrated", DEFAULT_CALIBRATED),
    ("random", None),
    ("static", "prior+weighted"),
    ("calibrated on the task", DEFAULT_CALIBRATED),
    ("svd", "strided+weighted"),
    ("svd", "tokens"),
    ("calibrated", f"{DEFAULT_CALIBRATED}+normalised"),
)
STRESSED = (*VARIANTS[:6], ("calibrated", "strided+weighted"), VARIANTS[7])
SETTINGS = ("steps", "batch", "rate", "tests", "calibration")


@dataclass(frozen=True)
class Run:
    """One fine-tuning. ``s`` and ``tokens`` are None for "dense", ``score`` where there is none."""

    estimator: str
    score: str | None
    s: float | None
    tokens: str | None
    seed: int


def runs(seeds: int) -> list[Run]:
    """All of them: seed by seed, what decides first."""
    found = []
    for seed in range(seeds):
        found.append(Run("dense", None, None, None, seed))
        for s, (estimator, score) in itertools.product(SPARSITIES, VARIANTS):
            found.append(Run(estimator, score, s, "context", seed))
        for estimator, score in STRESSED:
            found.append(Run(estimator, score, STRESS, "all", seed))
    return found


def estimators(model: Any, args: argparse.Namespace) -> dict[str, slx.SVDEstimator]:
    """By name; the shipped model's own domain is the task's only for the last."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    other = calibration_batches(tokenizer, args.calibration)
    own = batches_of("train", args.calibration, args.batch, 0)
    plain = slx.SVDEstimator.build(model, RANK, progress=False)
    calibrated = slx.SVDEstimator.build(model, RANK, calibration=other, progress=False)
    task = slx.SVDEstimator.build(model, RANK, calibration=own, progress=False)
    return {
        "svd": plain, "dense": plain, "random": plain, "calibrated": calibrated,
        "static": calibrated, "calibrated on the task": task,
    }  # fmt: skip


def plan_of(run: Run, layers: int) -> slx.SparsityPlan | None:
    """Every feed-forward region but the first one (noise is scored as "pooled"); None: dense."""
    if run.s is None:
        return None
    regions = {f"layers.{i}.mlp": run.s for i in range(1, layers)}
    options = POLICY | {"tokens": run.tokens, "score": run.score or "pooled"}
    return slx.SparsityPlan(regions, **options)


def complete(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Do the runs that the file lacks; it is written after each."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"rank": RANK}
    start = time.perf_counter()
    results: dict[str, Any] = {"settings": settings, "runs": [], "seconds": 0.0}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            raise SystemExit(
                f"{path} holds runs with {results['settings']}; delete it, or use them"
            )
    have = {Run(**{k: v for k, v in row.items() if k != "loss"}) for row in results["runs"]}
    missing = [run for run in runs(args.seeds) if run not in have]
    if not missing:
        return results
    fresh = load_model(0)
    known = estimators(fresh, args)
    training = batches_of("train", args.steps, args.batch, 0)
    tests = batches_of("test", args.tests, args.batch, 0)
    results |= {"before_training": answer_loss(fresh, tests)}
    results |= {k: v for k, v in about(args, 0.0).items() if k in ("machine", "versions")}
    earlier = results["seconds"]
    for n, run in enumerate(missing, 1):
        estimator = known[run.estimator]
        estimator = noise(estimator, run.seed) if run.estimator == "random" else estimator
        plan = plan_of(run, fresh.config.num_hidden_layers)
        model = train(plan, estimator, training, args, run.seed)
        results["runs"].append(asdict(run) | {"loss": answer_loss(model, tests)})
        results["seconds"] = round(earlier + time.perf_counter() - start, 1)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{n} of {len(missing)}: {results['runs'][-1]}, {results['seconds']} s", flush=True)
    return results


def means(results: dict[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    """``(estimator, score, s, tokens)`` -> the loss of each seed."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in sorted(results["runs"], key=lambda row: row["seed"]):
        key = (row["estimator"], row["score"], row["s"], row["tokens"])
        found.setdefault(key, []).append(row["loss"])
    return found


def show(results: dict[str, Any]) -> None:
    """One line per way of choosing; the change is against dense of the same seed."""
    found = means(results)
    dense = found.get(("dense", None, None, None), [])
    for (estimator, score, s, tokens), losses in sorted(found.items(), key=str):
        change = [a - b for a, b in zip(losses, dense, strict=False)]
        each = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{estimator:<23}{score or '-':<34}{s or 0:<6}{tokens or '-':<9}"
              f"{statistics.mean(losses):.4f} ({each}) {statistics.mean(change):+.4f}")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What one run is like."""
    parser.add_argument("--steps", type=int, default=60, help="fine-tuning steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="problems per step")
    parser.add_argument("--tests", type=int, default=32, help="batches to test on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--calibration", type=int, default=16, help="batches to calibrate on")
    parser.add_argument("--backend", default="aot_eager", help="inductor, aot_eager or eager")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    show(complete(args.json, args))


if __name__ == "__main__":
    main()
