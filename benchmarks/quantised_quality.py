"""Does sparsity cost more on a quantised base? The shipped model in NF4, dense and sparse training.

    python -m benchmarks.quantised_quality --json benchmarks/results/quantised_quality.json

Every run of a base and a seed starts from the same adapters, sees the same batches in the same
order and is judged dense: the loss on the answers of wordings that training has never shown, and
the share of such problems that greedy generation answers right. The sparse plan has the demo's
sparsities. ``fp32`` is the same on the base as it was before it was quantised. A run that the file
already holds is not repeated; ``--minutes`` stops in time to go on later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

import sparselora_fx as slx
from benchmarks.demo.models import MODEL, RANK, SPARSITY, load_model
from benchmarks.demo.scoring import accuracy
from benchmarks.demo.scoring import test_loss as answer_loss
from benchmarks.demo.word_problems import generate
from benchmarks.sensitivity import POLICY, about, train
from benchmarks.track_adapter import batches_of

BASES = ("nf4", "fp32")
WAYS = ("dense", "sparse")
SETTINGS = ("steps", "batch", "rate", "tests", "problems", "backend")


def load_nf4(seed: int) -> Any:
    """The shipped model with its linears in NF4, and the demo's fresh adapters."""
    lora = load_model(seed).peft_config["default"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    set_seed(seed)
    return get_peft_model(base, lora)


LOAD = {"nf4": load_nf4, "fp32": load_model}


def complete(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Do the runs that the file lacks, until the time is up; it is written after each."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    found: dict[str, Any] = {"settings": settings, "runs": [], "before_training": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{path} holds runs with {found['settings']}; delete it, or use them")
    found |= {k: v for k, v in about(args, 0.0).items() if k in ("machine", "versions")}
    done = {(row["base"], row["way"], row["seed"]) for row in found["runs"]}
    end = time.monotonic() + 60 * args.minutes
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    training = batches_of("train", args.steps, args.batch, 0)
    tests = batches_of("test", args.tests, args.batch, 0)
    problems = generate("test", args.problems, 1)
    for base in BASES:
        estimator = slx.SVDEstimator.build(LOAD[base](0), RANK, progress=False)
        if base not in found["before_training"]:
            found["before_training"][base] = answer_loss(LOAD[base](0), tests)
        for seed in range(args.seeds):
            for way in WAYS:
                if (base, way, seed) in done or time.monotonic() > end:
                    continue
                start = time.perf_counter()
                plan = slx.SparsityPlan(SPARSITY, **POLICY) if way == "sparse" else None
                model = train(plan, estimator, training, args, seed, LOAD[base])
                row = {"base": base, "way": way, "seed": seed, "loss": answer_loss(model, tests)}
                row["accuracy"] = accuracy(model, tokenizer, problems)
                row["seconds"] = round(time.perf_counter() - start, 1)
                found["runs"].append(row)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(row, flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Means over seeds as Markdown, with the standard deviation, and what sparsity changes, pair by
    pair of a seed."""
    rows = {(r["base"], r["way"], r["seed"]): r for r in found["runs"]}
    lines = ["| base | training | loss | right answers |", "|---|---|--:|--:|"]
    for base in BASES:
        for way in WAYS:
            own = [r for key, r in rows.items() if key[:2] == (base, way)]
            lines.append(
                f"| {base} | {way} | {_spread(own, 'loss')} | {_spread(own, 'accuracy')} |"
            )
        seeds = [seed for b, way, seed in rows if b == base and way == "sparse"]
        pairs = [(rows[base, "sparse", s], rows[base, "dense", s]) for s in seeds]
        changes = [{k: a[k] - b[k] for k in ("loss", "accuracy")} for a, b in pairs]
        lines.append(
            f"| {base} | sparse - dense | {_spread(changes, 'loss')} "
            f"| {_spread(changes, 'accuracy')} |"
        )
    return "\n".join(lines)


def _spread(rows: list[dict[str, Any]], what: str) -> str:
    values = [row[what] for row in rows]
    if len(values) < 2:
        return "-"
    if what == "accuracy":
        return f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="fine-tuning steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="problems per step")
    parser.add_argument("--tests", type=int, default=32, help="batches to take the loss of")
    parser.add_argument("--problems", type=int, default=256, help="to generate answers of")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--backend", default="aot_eager", help="inductor, aot_eager or eager")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after these")
    args = parser.parse_args()
    print(table(complete(args.json, args)))


if __name__ == "__main__":
    main()
