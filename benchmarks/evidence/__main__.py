"""Sparse beside dense fine-tuning of a real language model, run by run, until the file is complete.

    python -m benchmarks.evidence --task arithmetic --json benchmarks/results/evidence.json

Every arm starts from the same adapters and sees the same batches in the same order as dense LoRA
with that seed; its learning rate is the best of ``--rates`` by the loss on the validation split.
Each finished run is in the file at once, and one that is there is not repeated: stop and start as
you like. ``--status`` prints the table and what is missing, and runs nothing. docs/evidence.md
says how to install the model and the data, and what came out.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import sparselora_fx as slx
from benchmarks.evidence.arms import ARMS, DENSE, RANK, UNTRAINED
from benchmarks.evidence.model import Base, load
from benchmarks.evidence.plots import plot
from benchmarks.evidence.results import Results, open_results, table
from benchmarks.evidence.tasks import TASKS, encoded
from benchmarks.evidence.training import Settings, Trained, judge, train

TUNING_SEED = 1000


@dataclass
class Bench:
    """A model, a file, and what runs share."""

    base: Base
    settings: Settings
    results: Results
    plain: slx.SVDEstimator | None = None

    def untrained(self, task: str) -> None:
        """The score before any training, once."""
        if not self.results.has(task, UNTRAINED, 0):
            self._add(task, UNTRAINED, 0, None, judge(self.base.model, self.base, self._test(task)))

    def run(self, task: str, arm: str, seed: int) -> None:
        """One run, tuned first, unless the file has it."""
        if self.results.has(task, arm, seed):
            return
        rate = self.tuned(task, arm)
        trained = self._train(task, arm, seed, rate)
        found = judge(trained.model, self.base, self._test(task))
        self.base.bare(trained.model)
        self.results.curves[f"{task}/{arm}/{seed}"] = trained.losses
        self._add(task, arm, seed, rate, found, trained.flops_share)

    def tuned(self, task: str, arm: str) -> float:
        """The learning rate of the least validation loss; one rate needs no try."""
        rates = self.settings.rates
        if len(rates) == 1:
            return rates[0]
        held = encoded(TASKS[task], "validation", self.settings.tests, 0, self.base.tokenizer)
        for rate in rates:
            if rate not in self.results.tried(task, arm):
                trained = self._train(task, arm, TUNING_SEED, rate)
                _, loss = judge(trained.model, self.base, held)
                self.base.bare(trained.model)
                self.results.tuning.append({"task": task, "arm": arm, "lr": rate, "loss": loss})
                self.results.save()
                print(f"{task} {arm}: lr {rate:g} has validation loss {loss:.4f}", flush=True)
        tried = self.results.tried(task, arm)
        return min(rates, key=lambda rate: tried[rate])

    def _train(self, task: str, arm: str, seed: int, rate: float) -> Trained:
        way = ARMS[arm]
        if self.plain is None and way.estimator not in ("online", "none"):
            self.plain = plain_estimator(self.base, self.settings)
        count = self.settings.steps * self.settings.batch
        # More than needed, as those whose options begin alike are left out.
        items = encoded(TASKS[task], "train", count * 5 // 4, seed, self.base.tokenizer)
        if len(items) < count:
            raise SystemExit(
                f"{task} has {len(items)} items for {self.settings.steps} steps of "
                f"{self.settings.batch}; take fewer steps or smaller batches"
            )
        return train(self.base, way, self.plain, items[:count], self.settings, seed=seed, rate=rate)

    def _test(self, task: str) -> Any:
        return encoded(TASKS[task], "test", self.settings.tests, 0, self.base.tokenizer)

    def _add(self, task: str, arm: str, seed: int, rate: float | None,
             found: tuple[float, float], share: float = 0.0) -> None:  # fmt: skip
        score, loss = found
        row = {"task": task, "arm": arm, "seed": seed, "lr": rate, "score": score, "loss": loss,
               "flops_share": share}  # fmt: skip
        self.results.runs.append(row)
        self.results.save()
        print(row, flush=True)


def plain_estimator(base: Base, settings: Settings) -> slx.SVDEstimator:
    """SVD factors of the frozen weights, by the names that they have below adapters."""
    model = base.adapted(0, settings.lora_rank)
    estimator = slx.SVDEstimator.build(model, RANK, progress=False)
    base.bare(model)
    return estimator


def todo(
    results: Results, tasks: list[str], arms: list[str], seeds: int
) -> list[tuple[str, str, int]]:
    """The runs that a file lacks, seed by seed, dense first."""
    order = sorted(arms, key=lambda arm: arm != DENSE)
    wanted = [(task, arm, seed) for seed in range(seeds) for task in tasks for arm in order]
    return [run for run in wanted if not results.has(*run)]


def complete(bench: Bench, tasks: list[str], arms: list[str], seeds: int) -> None:
    """Do what the file lacks."""
    earlier, start = bench.results.seconds, time.perf_counter()
    for task in tasks:
        bench.untrained(task)
    missing = todo(bench.results, tasks, arms, seeds)
    for n, run in enumerate(missing, 1):
        bench.run(*run)
        bench.results.seconds = earlier + time.perf_counter() - start
        bench.results.save()
        print(f"{n} of {len(missing)} runs, {time.perf_counter() - start:.0f} s", flush=True)


def about(device: str) -> dict[str, Any]:
    """Where it ran."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line; settings that are left out are `Settings`'."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--task", nargs="+", choices=sorted(TASKS), default=list(TASKS), metavar="T")
    found.add_argument("--json", type=Path, required=True)
    found.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    found.add_argument("--seeds", type=int, default=5)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--folder", type=Path, help="another model, as transformers saves them")
    found.add_argument("--plot", type=Path, help="draw what the file holds; needs matplotlib")
    found.add_argument("--status", action="store_true", help="print the table, run nothing")
    default = Settings()
    found.add_argument("--rates", type=float, nargs="+", default=default.rates)
    for name in ("steps", "batch", "tests", "lora_rank"):
        found.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    found.add_argument("--dtype", choices=("bfloat16", "float32"), default=default.dtype)
    found.add_argument("--backend", default=default.backend, help="inductor, aot_eager or eager")
    return found


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    named = {field.name: getattr(args, field.name, None) for field in fields(Settings)}
    named["model"] = Settings.model if args.folder is None else args.folder.name
    settings = Settings(**(named | {"rates": tuple(args.rates)}))
    results = open_results(args.json, None if args.status else settings, about(args.device))
    if not args.status:
        base = load(args.folder, getattr(torch, settings.dtype), args.device)
        complete(Bench(base, settings, results), args.task, args.arms, args.seeds)
    if args.plot is not None:
        plot(results, args.plot)
    print(table(results))
    missing = todo(results, args.task, args.arms, args.seeds)
    print(f"{len(results.runs)} runs in {args.json}; {len(missing)} of those asked for are missing")
    print(f"settings: {results.settings}")


if __name__ == "__main__":
    main()
