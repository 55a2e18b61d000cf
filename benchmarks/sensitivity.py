"""The structural default plan against plans from sensitivity tables, at equal base FLOPs.

All plans keep (nearly) the same share of the base FLOPs of a sparse token. One table is measured
on the model as it is before fine-tuning, one after a dense start. All variants start from the same
adapters, see the same batches in the same order for the same number of steps, and are judged by
the dense model's loss on the answers of wordings that training has never shown.

    python -m benchmarks.sensitivity --json benchmarks/results/sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoTokenizer

import sparselora_fx as slx
from benchmarks.demo.batches import collate, encode
from benchmarks.demo.models import MODEL, RANK, load_model
from benchmarks.demo.scoring import test_loss as answer_loss
from benchmarks.demo.word_problems import generate
from sparselora_fx.model.frozen_weights import frozen_weights

LEVELS = (0.25, 0.5, 0.75, 0.9, 0.95)
POLICY = {"tokens": "context", "start_step": 0.05, "channel_multiple": 16}


def share_kept(model: Any, estimator: Any, plan: Any, batch: dict[str, Any]) -> float:
    """The share of a sparse token's base FLOPs that remains, counted from what one call used."""
    slx.compile(model.train(), estimator, plan=plan, backend="eager", regional=True)
    with slx.record(model) as record:
        slx.step(model, 1, 1)
        model(**batch)
    slx.restore(model)
    kept = total = 0
    for weight in frozen_weights(model):
        rows, columns = weight.out_features, weight.in_features
        total += rows * columns
        side, used = record.sites.get(weight.name, ("", torch.empty(0)))
        kept += (len(used) if side == "out" else rows) * (len(used) if side == "in" else columns)
    return kept / total


def train(
    plan: slx.SparsityPlan | None,
    estimator: Any,
    batches: Any,
    args: Any,
    seed: int,
    load: Callable[[int], Any] = load_model,
) -> Any:
    """Fine-tune fresh adapters of what ``load`` makes of the seed; returns the model, no longer
    compiled."""
    model = load(seed).train()
    torch.compiler.reset()
    # Dense runs through the same compiler: sparsity 0 rewrites nothing.
    plan = slx.SparsityPlan(0.0, **POLICY) if plan is None else plan
    slx.compile(model, estimator, plan=plan, backend=args.backend, regional=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.rate)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    for n in range(args.steps):
        slx.step(model, n, args.steps)
        model(**batches[int(order[n % len(order)])]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return slx.restore(model)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison."""
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pad = tokenizer.pad_token_id

    def batches(split: str, count: int, seed: int) -> list[dict[str, Any]]:
        examples = [encode(p, tokenizer) for p in generate(split, count * args.batch, seed)]
        return [collate(examples[i : i + args.batch], pad)
                for i in range(0, len(examples), args.batch)]  # fmt: skip

    fresh = load_model(0)
    estimator = slx.SVDEstimator.build(fresh, rank=RANK, progress=False)
    training, tests = batches("train", args.steps, 0), batches("test", args.tests, 0)
    calibration = batches("train", args.measure, 1)
    default = slx.SparsityPlan("default", **POLICY)
    share = share_kept(fresh, estimator, default, training[0])
    plans: dict[str, Any] = {"dense": None, "structural default": default}
    tables = {}
    for name in ("before", "after"):
        model = fresh if name == "before" else train(None, estimator, training, args, 99)
        table = slx.sensitivity(model, estimator, calibration, LEVELS, backend=args.backend)
        print(table, flush=True)
        table.plot(Path(args.json).with_name(f"{Path(args.json).stem}_{name}.png"))
        tables[name] = asdict(table)
        found = slx.SparsityPlan.from_sensitivity(table, flops=share, start_step=0.05)
        plans[f"sensitivity {name} dense training"] = found
    rows = {
        name: {"base_flops": share_kept(fresh, estimator, plan or 0.0, training[0]),
               "plan": plan and plan.sparsity, "loss": []}
        for name, plan in plans.items()
    }  # fmt: skip
    for seed in range(args.seeds):
        for name, plan in plans.items():
            model = train(plan, estimator, training, args, seed)
            rows[name]["loss"].append(answer_loss(model, tests))
            print(f"seed {seed}: {name} {rows[name]['loss'][-1]:.4f}", flush=True)
    results = {"before_training": answer_loss(fresh, tests), "variants": rows, "tables": tables}
    return results | about(args, time.perf_counter() - start)


def about(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What was run, where, and for how long."""
    return {
        "settings": {k: v for k, v in vars(args).items() if k != "json"} | {"policy": POLICY},
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(),
                    "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "peft": peft.__version__},
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """One line per variant."""
    print(f"{'variant':<36}{'base FLOPs':>10}  mean test loss (each seed)")
    for name, row in results["variants"].items():
        each = " ".join(f"{loss:.4f}" for loss in row["loss"])
        mean = statistics.mean(row["loss"])
        print(f"{name:<36}{row['base_flops']:>10.1%}  {mean:.4f} ({each})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="result file; the plot goes beside it")
    parser.add_argument("--steps", type=int, default=40, help="fine-tuning steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="problems per step")
    parser.add_argument("--measure", type=int, default=6, help="batches to measure on")
    parser.add_argument("--tests", type=int, default=24, help="batches to test on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--backend", default="aot_eager", help="inductor, aot_eager or eager")
    args = parser.parse_args()
    results = run(args)
    Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
