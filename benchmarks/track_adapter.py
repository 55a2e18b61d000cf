"""Does a predictor that follows the adapter choose better channels after training?

    python -m benchmarks.track_adapter --json F

The shipped model is fine-tuned densely with LoRA on all its linears; then its feed-forward regions
choose channels at several sparsities, with and without `track_adapter`, by the paper's estimator
and by a calibrated one. Reported: the mean overlap with the true top k of the *adapted*
activations. Calibration reads training problems before training, the overlap test problems.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import sparselora_fx as slx
from benchmarks.demo.batches import Batch, collate, encode
from benchmarks.demo.models import MODEL
from benchmarks.demo.word_problems import generate
from benchmarks.support.overlap import overlaps

SPARSITIES = (0.75, 0.9)
RANK = 8


def load(seed: int) -> PeftModel:
    """The shipped model in fp32 with LoRA of rank 16 on all linears."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def batches_of(split: str, count: int, size: int, seed: int) -> list[Batch]:
    """``count`` batches of ``size`` word problems."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [encode(problem, tokenizer) for problem in generate(split, count * size, seed)]
    chunks = (rows[i : i + size] for i in range(0, len(rows), size))
    return [collate(chunk, tokenizer.pad_token_id) for chunk in chunks]


def fine_tune(model: PeftModel, batches: list[Batch], rate: float) -> float:
    """Dense AdamW steps, one per batch; the mean loss of the last ten."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for batch in tqdm(batches, desc="dense fine-tuning"):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return statistics.mean(losses[-10:])


def measure(
    model: PeftModel, estimators: dict[str, slx.SVDEstimator], batch: Batch, when: str
) -> list[dict[str, Any]]:
    """One row per estimator, sparsity and setting."""
    rows = []
    for name, estimator in estimators.items():
        for sparsity in SPARSITIES:
            regions = {f"layers.{i}.mlp": sparsity for i in range(model.config.num_hidden_layers)}
            for track in (False, True):
                score = "pooled" if name == "svd" else None  # the paper's, or the default
                plan = slx.SparsityPlan(
                    regions, tokens="all", start_step=0, score=score, track_adapter=track
                )
                slx.compile(model, estimator, plan=plan, backend="eager")
                found = overlaps(model, batch).values()
                slx.restore(model)
                torch.compiler.reset()
                row = {"when": when, "estimator": name, "s": sparsity, "track_adapter": track}
                row["overlap"] = round(statistics.mean(o.found for o in found), 4)
                row["chance"] = round(statistics.mean(o.chance for o in found), 4)
                rows.append(row)
                print(row, flush=True)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure before and after training."""
    model = load(args.seed)
    training = batches_of("train", args.steps, 16, args.seed)
    (test,) = batches_of("test", 1, 32, args.seed)
    estimators = {
        "svd": slx.SVDEstimator.build(model, rank=RANK),
        "calibrated": slx.SVDEstimator.build(model, rank=RANK, calibration=training[:8]),
    }
    rows = measure(model, estimators, test, "before training")
    loss = fine_tune(model, training, args.rate)
    rows += measure(model, estimators, test, "after training")
    settings = {"steps": args.steps, "rate": args.rate, "seed": args.seed, "rank": RANK}
    return {"settings": settings, "last_loss": loss, "torch": torch.__version__, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.json.write_text(json.dumps(run(args), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
