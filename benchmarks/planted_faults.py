"""Faults planted into sparse fine-tuning of the shipped model: does the watch see them, and when?

    python -m benchmarks.planted_faults --json F [--seeds 10 11 12 13 14] [--fault NAME ...]

Each run fine-tunes the shipped model on word problems: LoRA on its attention linears, the demo's
plan, an estimator calibrated on the first batches, a watch in mode "adapt" that probes every step,
and a fault planted half-way (a plan that is too sparse: from step 0, and in a longer run, for what
the steps before it is seen have cost is otherwise the lead of dense training by as many steps). The
first steps are dense otherwise, as by default: before adapters have learnt the form of an answer,
this plan's loss is 0.1 lower than the dense one's. `probes` is how many probes passed until the
watch acted (null: it did not); `loss` is the dense model's afterwards, on problems that no run
trains on, and `dense_loss` that of dense training with the same seed (and the same learning rate
and batches). "none" plants nothing: there the watch must stay quiet. Seeds below 10 were used to
choose the watch's bounds, the default ones were not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import sparselora_fx as slx
from benchmarks.demo.batches import collate, encode
from benchmarks.demo.models import MODEL, RANK, SPARSITY, load_model
from benchmarks.demo.scoring import test_loss
from benchmarks.demo.word_problems import generate
from benchmarks.support.activations import test_batches as docstring_batches
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.estimator.statistics import Statistics
from sparselora_fx.runtime.runtime import get_runtime

STEPS, START, PLANTED, BATCH, RATE = 36, 6, 18, 8, 1e-3
LONG, EXAMPLES = 120, 400  # steps of a run that begins with a fault; what all of them train on
LENGTH = 64  # of the other domain's texts, in tokens
CALIBRATION = 8  # batches that the estimator is calibrated on: those of the first steps
FAULTY = 2  # seeds that a fault is tried with: all in long runs, whose ends differ more


@dataclass
class Run:
    """What a fault may reach: the model, its optimizer, the estimator, and how batches are made."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    estimator: slx.SVDEstimator
    batches: Callable[[int], dict[str, Any]]


def nothing(run: Run) -> None:
    """No fault."""


def random_factors(run: Run) -> None:
    """The factors become random numbers of the same size, and what calibration knew of a channel
    is said of another."""
    generator = torch.Generator().manual_seed(0)

    def other(factor: torch.Tensor) -> torch.Tensor:
        made = torch.randn(factor.shape, generator=generator)
        return made / made.norm() * factor.float().norm()

    def shuffled(known: Statistics) -> Statistics:
        return Statistics(*(v[torch.randperm(len(v), generator=generator)] for v in known))

    given = run.estimator
    factors = {n: Factors(other(f.a), other(f.b)) for n, f in given.factors.items()}
    statistics = {n: shuffled(known) for n, known in given.statistics.items()}
    place(run, replace(given, factors=factors, statistics=statistics))


def another_models(run: Run) -> None:
    """The estimator of a model of the same shapes with other weights."""
    other = load_model(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter[torch.randperm(len(parameter))])
    place(run, estimator_of(other, [run.batches(n) for n in range(CALIBRATION)]))


def estimator_of(model: nn.Module, batches: list[dict[str, Any]]) -> slx.SVDEstimator:
    """Calibrated on some batches."""
    return slx.SVDEstimator.build(model, rank=RANK, calibration=batches, progress=False)


def place(run: Run, estimator: slx.SVDEstimator) -> None:
    """Put factors where the right ones are."""
    runtime = get_runtime(run.model)
    runtime.attached.place(estimator, estimator.score_of(runtime.plan.score))


def fast(run: Run) -> None:
    """Ten times the learning rate: what the estimator was built for is soon past."""
    for group in run.optimizer.param_groups:
        group["lr"] *= 10


def other_domain(run: Run) -> None:
    """From now on docstrings of PyTorch, of which the last tokens carry loss: the channels that
    calibration found for word problems are not those of this text."""
    texts = docstring_batches(AutoTokenizer.from_pretrained(MODEL), STEPS)

    def batches(step: int) -> dict[str, Any]:
        ids = texts[step]["input_ids"][:, :LENGTH]
        labels = ids.clone()
        labels[:, :-12] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    run.batches = batches


def not_a_number(run: Run) -> None:
    """Sparse calls return NaN."""
    runtime = get_runtime(run.model)
    forward: Any = run.model.forward
    healthy = forward.compiled

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = healthy(*args, **kwargs)
        if runtime.sparse_now and not runtime.caps:
            out.loss = out.loss * float("nan")
        return out

    forward.compiled = poisoned


FAULTS = {
    "none": nothing,
    "random factors": random_factors,
    "another model's factors": another_models,
    "10x learning rate": fast,
    "another domain": other_domain,
    "NaN": not_a_number,
    "0.99 in the first layer": nothing,
}
FROM_START = {"0.99 in the first layer": {"layers.0.mlp": 0.99}}  # faults of the plan
# Dense training that it is compared with suffers from them as well, or is as long.
DENSE_TOO = {"10x learning rate", "another domain", *FROM_START}


@cache
def dense_loss(fault: str, seed: int) -> float:
    """What dense training ends with, beside the fault."""
    model, _ = trained(fault, seed, dense=True)
    return held_out(model)


def train(fault: str, seed: int) -> dict[str, Any]:
    """One run; see the top of the file."""
    model, took = trained(fault, seed)
    seen = _seen(model, 0 if fault in FROM_START else PLANTED)
    row = {"fault": fault, "seed": seed, "loss": held_out(model)}
    row["dense_loss"] = dense_loss(fault if fault in DENSE_TOO else "none", seed)
    return row | {"seconds": round(took, 1)} | seen


def held_out(model: nn.Module) -> float:
    """The dense model's loss on problems that no run trains on."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held = [encode(p, tokenizer) for p in generate("test", 96)]
    parts = [collate(held[i : i + 32], tokenizer.pad_token_id) for i in range(0, len(held), 32)]
    return round(test_loss(model, parts), 4)


def steps_of(fault: str) -> int:
    """How long a run is."""
    return LONG if fault in FROM_START else STEPS


def trained(fault: str, seed: int, *, dense: bool = False) -> tuple[nn.Module, float]:
    """A model after a run, and the seconds that its steps took."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    examples = [encode(p, tokenizer) for p in generate("train", EXAMPLES)]
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed)).tolist()
    steps = steps_of(fault)
    order *= -(-steps * BATCH // EXAMPLES)
    batches = [
        collate([examples[i] for i in order[n * BATCH : (n + 1) * BATCH]], tokenizer.pad_token_id)
        for n in range(steps)
    ]
    model = load_model(seed)
    estimator = estimator_of(model, batches[:CALIBRATION])
    sparsity, start = FROM_START.get(fault, SPARSITY), 0 if fault in FROM_START else START
    if not dense:
        plan = slx.SparsityPlan(sparsity, start_step=start)
        watch = slx.Watch(every=1, mode="adapt", quiet=8)
        slx.compile(model, estimator, plan=plan, backend="eager", watch=watch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    run = Run(model, optimizer, estimator, lambda step: batches[step])
    begin = time.perf_counter()
    model.train()
    for step in range(steps):
        if not dense:
            slx.step(model, step, steps)
        if step == PLANTED:
            FAULTS[fault](run)
        model(**run.batches(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, time.perf_counter() - begin


def _seen(model: nn.Module, planted: int) -> dict[str, Any]:
    """What the watch did from the fault on, and before."""
    drift = slx.drift(model)
    acted = [p for p in drift.probes if p.action and p.action.startswith(("down", "none"))]
    after = [p for p in acted if p.step >= planted]
    before = [p for p in acted if p.step < planted]
    later = [p for p in drift.probes if p.step >= planted]
    calm = [p for p in drift.probes if p.step < planted] or later
    first = None if not after else 1 + next(i for i, p in enumerate(later) if p is after[0])
    return {
        "probes": first,
        "action": after[0].action if after else None,
        "false_alarms": len(before),
        "levels": {name: level for name, level in drift.levels.items()},
        "gap": round(statistics.median(p.loss_gap or 0.0 for p in calm), 4),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each fault as Markdown: probes until the watch acted, false alarms before, losses
    seed by seed."""
    lines = [
        "| fault | seeds | seen after probes | false alarms | loss | dense training |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for fault in dict.fromkeys(run["fault"] for run in runs):
        own = [run for run in runs if run["fault"] == fault]
        seen = ", ".join("-" if r["probes"] is None else str(r["probes"]) for r in own)
        cells = [fault, str(len(own)), seen, str(sum(r["false_alarms"] for r in own))]
        cells += [", ".join(f"{r[name]:.3f}" for r in own) for name in ("loss", "dense_loss")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, print a line each, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 15)),
                        help=f"of each kind of run; short ones with faults: {FAULTY}")  # fmt: skip
    parser.add_argument("--fault", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="a sparse step broke")
    runs: list[dict[str, Any]] = []
    for fault in args.fault:
        every = fault == "none" or fault in FROM_START
        for seed in args.seeds if every else args.seeds[:FAULTY]:
            torch.compiler.reset()
            runs.append(train(fault, seed))
            print(json.dumps(runs[-1]), flush=True)
            facts = {
                "torch": torch.__version__, "threads": torch.get_num_threads(), "steps": STEPS,
                "start": START, "planted": PLANTED, "tolerance": slx.Watch().tolerance,
                "long": LONG, "backend": "eager", "runs": runs,
            }  # fmt: skip
            args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
