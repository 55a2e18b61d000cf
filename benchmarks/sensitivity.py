"""Structural plans against plans from a sensitivity table, at equal base FLOPs.

Each pair keeps the same share of the base FLOPs of a sparse token. All variants start from the
same adapters, see the same batches in the same order for the same number of steps, and are judged
by the dense model's loss on the answers of wordings that training has never shown.

    python -m benchmarks.sensitivity --json benchmarks/results/sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

import sparselora_fx as slx
from benchmarks.demo import MODEL, RANK, collate, encode, load_model
from benchmarks.demo import test_loss as answer_loss
from benchmarks.word_problems import generate
from sparselora_fx.frozen import frozen_weights

LEVELS = (0.25, 0.5, 0.75, 0.9, 0.95)
# The dense first quarter and last block of the structural default, with these in between.
STRUCTURES = {"default": (0.75, 0.25), "strong": (0.95, 0.5)}
POLICY = {"tokens": "context", "start_step": 0.05, "channel_multiple": 16}


def structural(model: nn.Module, ffn: float, attention: float) -> dict[str, float]:
    """The default plan's layers, as plan keys, at other sparsities."""
    found = slx.SparsityPlan.default().resolve(frozen_weights(model), [])
    names = [name for name, sparsity in found.items() if sparsity.ffn]
    blocks = {".".join(name.split(".layers.")[1].split(".")[:1]) for name in names}
    plan = {f"layers.{block}.mlp": ffn for block in sorted(blocks)}
    return plan | {f"layers.{block}.self_attn": attention for block in sorted(blocks)}


def share_kept(model: nn.Module, estimator: Any, plan: Any, batch: dict[str, Any]) -> float:
    """The share of a sparse token's base FLOPs that remains, counted from what one call used."""
    slx.compile(model.train(), estimator, plan=plan, backend="eager", regional=True)
    with slx.record(model) as record, torch.no_grad():
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


def train(plan: slx.SparsityPlan | None, estimator: Any, data: Any, args: Any, seed: int) -> float:
    """Fine-tune fresh adapters and return the dense test loss in nats per answer token."""
    batches, tests = data
    model = load_model(seed).train()
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
    slx.restore(model)
    return answer_loss(model, tests)


def plans_of(model: Any, estimator: Any, table: Any, batch: Any) -> dict[str, dict[str, Any]]:
    """Per pair: the structural plan, the measured plan at the same share, and the shares."""
    found = {}
    for name, sparsities in STRUCTURES.items():
        by_structure = slx.SparsityPlan(structural(model, *sparsities), **POLICY)
        share = share_kept(model, estimator, by_structure, batch)
        measured = slx.SparsityPlan.from_sensitivity(table, flops=share, start_step=0.05)
        found[name] = {
            "structural": (by_structure, share),
            "sensitivity": (measured, share_kept(model, estimator, measured, batch)),
        }
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison."""
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pad = tokenizer.pad_token_id

    def batches(split: str, count: int, seed: int) -> list[dict[str, Any]]:
        examples = [encode(p, tokenizer) for p in generate(split, count * args.batch, seed)]
        return [collate(examples[i : i + args.batch], pad)
                for i in range(0, len(examples), args.batch)]  # fmt: skip

    model = load_model(0)
    estimator = slx.SVDEstimator.build(model, rank=RANK, progress=False)
    training, tests = batches("train", args.steps, 0), batches("test", args.tests, 0)
    begun = time.perf_counter()
    table = slx.sensitivity(model, estimator, batches("train", args.measure, 1), LEVELS,
                            tokens=POLICY["tokens"], backend=args.backend)  # fmt: skip
    seconds = time.perf_counter() - begun
    print(table)
    table.plot(Path(args.json).with_suffix(".png"))
    pairs = plans_of(model, estimator, table, training[0])
    data = (training, tests)
    results: dict[str, Any] = {"pretrained": answer_loss(model, tests), "dense": [], "pairs": {}}
    for seed in range(args.seeds):
        results["dense"].append(train(None, estimator, data, args, seed))
        print(f"seed {seed}: dense {results['dense'][-1]:.4f}", flush=True)
        for pair, plans in pairs.items():
            entry = results["pairs"].setdefault(pair, {})
            for name, (plan, share) in plans.items():
                row = entry.setdefault(
                    name, {"base_flops": share, "plan": plan.sparsity, "loss": []}
                )
                row["loss"].append(train(plan, estimator, data, args, seed))
                print(f"seed {seed}: {pair} {name} {row['loss'][-1]:.4f}", flush=True)
    for entry in results["pairs"].values():
        both = zip(entry["structural"]["loss"], entry["sensitivity"]["loss"], strict=True)
        entry["structural_minus_sensitivity"] = [a - b for a, b in both]
    results["table"] = [
        {"region": r.region, "level": r.level, "loss_change": r.loss_change,
         "saved": table.share_saved(r)} for r in table.rows
    ]  # fmt: skip
    results["measuring"] = {
        "seconds": seconds,
        "graphs": table.graphs,
        "rows": len(table.rows),
        "sparse_tokens": table.sparse_tokens,
    }
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

    def line(name: str, share: float, losses: list[float]) -> None:
        each = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:<24}{share:>8.1%}   {statistics.mean(losses):.4f}   ({each})")

    print("variant                 base FLOPs  mean test loss (each seed)")
    line("dense", 1.0, results["dense"])
    for pair, entry in results["pairs"].items():
        for name in ("structural", "sensitivity"):
            line(f"{pair}, {name}", entry[name]["base_flops"], entry[name]["loss"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="result file; the plot goes beside it")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps of each run")
    parser.add_argument("--batch", type=int, default=16, help="problems per step")
    parser.add_argument("--measure", type=int, default=8, help="batches to measure on")
    parser.add_argument("--tests", type=int, default=16, help="batches to test on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--backend", default="inductor", help="inductor, aot_eager or eager")
    args = parser.parse_args()
    results = run(args)
    Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
