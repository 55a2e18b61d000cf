"""How much of what matters do estimators and scores find? Output errors on held-out text.

    python -m benchmarks.estimator_quality --json F [--details F] [--plot F.png] [--loss]
        [--cost large] [--no-measure]

Rows, one per model, kind of region, estimator, score, sparsity and rank, averaged over the regions
and the test batches; channels are chosen batch by batch, as in training. ``svd``: factors of the
weights alone, the paper's; ``calibrated``: factors and prior from calibration; ``static``: the
prior alone; ``exact``: the weights themselves in the place of factors, so that only the score's
sample of tokens is left to lose by; ``random``: the mean of several draws; ``oracle``: of
feed-forwards the channels whose dense activations contribute most to the output, ``|h_n| |w_n|``,
of attentions the choice by every token's exact values. ``overlap`` is with the oracle's choice; for
errors see `quality.judge`; attentions (of a Llama) are judged by what they return when they are
sliced. ``loss`` is the mean over seeds of `benchmarks.quality_loss` with that
choice (plan's tokens "context"), from ``<F>_loss.json`` where that is; ``--loss`` does missing runs
first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import sparselora_fx as slx
from benchmarks import quality_loss, score_cost
from benchmarks.support import activations, measuring
from benchmarks.support.attention_quality import exact, is_llama
from benchmarks.support.quality import ScoreGraph
from benchmarks.support.quality_plot import plot
from benchmarks.support.quality_rows import (
    DRAWS,
    GAP_RANK,
    GAP_SPARSITIES,
    SAME,
    Row,
    Rows,
    attention_rows,
    gaps,
)
from benchmarks.track_adapter import batches_of

RANKS = (2, 4, 8, 16, 32)


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """All rows of one model, without losses."""
    model, tokenizer = activations.load(name)
    regions = activations.regions_of(model)
    calibration = activations.calibration_batches(tokenizer, args.calibration_batches)
    tests = activations.test_batches(tokenizer, args.test_batches)
    table = Rows(name, regions, activations.activations(model, regions, tests))
    table.add_references(seed=0)
    graphs: dict[Any, ScoreGraph] = {}
    for rank in args.ranks:
        plain = slx.SVDEstimator.build(model, rank, progress=False)
        aware = slx.SVDEstimator.build(model, rank, calibration=calibration, progress=False)
        estimators = {"svd": plain, "calibrated": aware}
        if rank == args.ranks[0]:
            producers = {n: w for each in regions for n, (w, _) in each.producers.items()}
            estimators |= {"static": aware, "exact": exact(plain, producers)}
        table.add_scores(estimators, rank, graphs)
        print(f"{name}, rank {rank}: {len(table.rows)} rows", flush=True)
        if rank == GAP_RANK and not is_llama(model):
            print(f"{name}: no rows of attentions, which are measured on a Llama", flush=True)
        elif rank == GAP_RANK:
            table.rows += attention_rows(name, model, tests, {"svd": plain, "calibrated": aware})
    return table.rows


def on_the_task(args: argparse.Namespace) -> list[Row]:
    """Rows of rank 8 for the shipped model on the problems that it is fine-tuned on, before
    training: calibrated on other text, and on the task's own training split."""
    model, tokenizer = activations.load(activations.DEMO)
    regions = activations.regions_of(model)
    tests = batches_of("test", args.test_batches, 16, 0)
    seen = activations.activations(model, regions, tests)
    own = batches_of("train", args.calibration_batches, activations.TEXTS, 0)
    other = activations.calibration_batches(tokenizer, args.calibration_batches)
    found: list[Row] = []
    for kind, data in {"other text": other, "the task": own}.items():
        table = Rows(activations.DEMO, regions, seen)
        table.add_references(seed=0)
        aware = slx.SVDEstimator.build(model, GAP_RANK, calibration=data, progress=False)
        plain = slx.SVDEstimator.build(model, GAP_RANK, progress=False)
        table.add_scores({"svd": plain, "calibrated": aware, "static": aware}, GAP_RANK, {})
        found += [row | {"calibration": kind} for row in table.rows]
    return found


def add_losses(rows: list[Row], results: dict[str, Any]) -> None:
    """Enter mean losses over seeds where a row's choice was fine-tuned with."""
    losses = quality_loss.means(results)
    for row in rows:
        if (row["model"], row["region"]) != (activations.DEMO, "ffn") or row["rank"] not in (
            results["settings"]["rank"],
            None,
        ):
            continue
        found = losses.get((row["estimator"], row["score"], row["s"], "context"))
        row["loss"] = None if found is None else round(statistics.mean(found), 4)


def run(args: argparse.Namespace, earlier: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and details; what is not asked for stays as the files have it."""
    losses = args.json.with_name(f"{args.json.stem}_loss.json")
    if args.loss:
        quality_loss.complete(losses, args)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    if args.json.exists() and earlier.exists():
        rows, details = (
            json.loads(file.read_text(encoding="utf-8")) for file in (args.json, earlier)
        )
    if args.measure:
        rows, details = joined(rows, details, *measure_all(args))
    if losses.exists():
        add_losses(rows, json.loads(losses.read_text(encoding="utf-8")))
    if args.cost:
        details["score_cost"] = score_cost.measure(args.cost)
    return rows, details


def joined(
    rows: list[Row], details: dict[str, Any], fresh: list[Row], beside: dict[str, Any]
) -> tuple[list[Row], dict[str, Any]]:
    """What was measured now, beside what the files say of other models."""
    names = {row["model"] for row in fresh}
    rows = [row for row in rows if row["model"] not in names] + fresh
    return rows, details | {
        "models": details.get("models", {}) | beside["models"],
        "gap_closed_at_rank_8": gaps(rows),
        "on_the_task": beside["on_the_task"] or details.get("on_the_task", []),
    }


def measure_all(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the models that are asked for, and what is said beside them."""
    rows: list[Row] = []
    marks = [(time.perf_counter(), time.process_time())]
    for name in args.models:
        rows += measure(name, args)
        marks.append((time.perf_counter(), time.process_time()))
    wall, cpu = ([round(b - a, 1) for a, b in itertools.pairwise(clock)]
                 for clock in zip(*marks, strict=True))  # fmt: skip
    keys = ("ranks", "test_batches", "calibration_batches")
    about = {
        "settings": {key: getattr(args, key) for key in keys} | {"draws": DRAWS, "seed": 0},
        "machine": measuring.machine("wall"),
        "versions": measuring.versions(),
    }
    return rows, {
        "models": {
            name: about | {"seconds": wall[i], "cpu_seconds": cpu[i]}
            for i, name in enumerate(args.models)
        },
        "on_the_task": on_the_task(args) if activations.DEMO in args.models else [],
    }


def write(path: Path, rows: list[Row], details: dict[str, Any], to: Path) -> None:
    """One row a line, so that a change shows as lines."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    to.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")


def show(rows: list[Row], shares: list[Row]) -> None:
    """Rank 8: errors per sparsity, and the share of the way to the oracle where that is counted."""
    closed = {tuple(row[key] for key in SAME): f"{row['error']:.1%}" for row in shares}
    for row in rows:
        if row["rank"] not in (GAP_RANK, None) or row["s"] not in GAP_SPARSITIES:
            continue
        gap = closed.get(tuple(row[key] for key in SAME), "")
        who = f"{row['model']:<22}{row['region']:<10}{row['s']:<5}{row['estimator']:<11}"
        who += f"{row['score'] or '-':<34}"
        print(f"{who}{row['overlap']:.3f}  {row['error']:.3f}  {row['token_error']:.3f}  {gap}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="the rows")
    parser.add_argument("--details", type=Path, help="default: <json>_details.json")
    parser.add_argument("--plot", type=Path, help="picture of the errors at rank 8")
    parser.add_argument("--models", nargs="+", default=activations.MODELS,
                        choices=activations.MODELS)  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--test-batches", type=int, default=4)
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True,
                        help="--no-measure keeps the rows of the file")  # fmt: skip
    parser.add_argument("--cost", default="", metavar="SHAPE", choices=score_cost.SHAPES,
                        help="time the scores too, at this shape")  # fmt: skip
    parser.add_argument("--loss", action=argparse.BooleanOptionalAction, default=False,
                        help="do the fine-tuning runs that <json>_loss.json lacks")  # fmt: skip
    quality_loss.add_arguments(parser)
    args = parser.parse_args()
    beside = args.details or args.json.with_name(f"{args.json.stem}_details.json")
    rows, details = run(args, beside)
    write(args.json, rows, details, beside)
    if args.plot:
        plot(rows, args.plot)
    show(rows, details["gap_closed_at_rank_8"])


if __name__ == "__main__":
    main()
