"""The demonstration: LoRA fine-tuning, sparse beside dense, on a CPU, over several seeds.

Both runs of a seed start from the same adapters, see the same batches through HF Trainer and are
compiled the same way (`torch.compile(model.forward)` against `sparselora_fx.compile`). Answers are
generated greedily by the dense model in eval mode and compared as numbers, on wordings that
training has never shown. Step time is forward + backward of one batch, measured dense, sparse,
dense, sparse.

    python -m benchmarks.demo
    python -m benchmarks.demo --model smollm2    # SmolLM2-135M, see docs/evidence.md
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import sparselora_fx as slx
from benchmarks.demo.batches import Example, as_trained, collate, encode
from benchmarks.demo.choices import CHOICES
from benchmarks.demo.models import RANK, renew_adapters
from benchmarks.demo.scoring import accuracy, flops_shares, step_times, test_loss
from benchmarks.demo.word_problems import generate
from benchmarks.support.overlap import overlaps


@dataclass
class Row:
    """One row of the final table, a value for each seed; shares and accuracies from 0 to 1."""

    name: str
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    step_ms: float | None = None
    speedup: float | None = None
    flops: float | None = None


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Says what is going on, and how many seconds it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def fine_tune(
    model: PeftModel, examples: list[Example], pad: int, args: argparse.Namespace, seed: int,
    callbacks: list[TrainerCallback],
) -> None:  # fmt: skip
    """Trains the adapters with HF Trainer; batches and their order follow the seed."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=max(1, args.steps // 2),
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=examples, callbacks=callbacks,
                          data_collator=lambda batch: collate(batch, pad))  # fmt: skip
        trainer.train()


def spread(values: Sequence[float], form: str) -> str:
    """``"53.1% (51.2% to 55.0%)"``: the mean, and the range over seeds where there are several."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(rows: list[Row]) -> str:
    """The result, one line per model."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = ("test loss", "exact match", "step time", "speed-up", "base FLOPs")
    widths = (27, 27, 12, 11, 13)
    lines = [" " * 14 + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    for row in rows:
        step = "-" if row.step_ms is None else f"{row.step_ms:.0f} ms"
        cells = (spread(row.losses, ".4f"), spread(row.accuracies, ".1%"), step,
                 cell(row.speedup, ".2f"), cell(row.flops, ".1%"))  # fmt: skip
        lines.append(
            f"{row.name:<14}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    return "\n".join(lines)


@dataclass
class Demo:
    """Both models, what they are asked, and the rows that come out."""

    args: argparse.Namespace

    def run(self) -> list[Row]:
        """The whole job; returns the rows of the table."""
        args, choice = self.args, CHOICES[self.args.model]
        self.sparse, self.tokenizer = choice.load(0)
        self.dense, _ = choice.load(0)
        self.pad = self.tokenizer.pad_token_id or 0
        self.problems = generate("test", args.tests, 0)
        examples = [encode(p, self.tokenizer) for p in self.problems]
        self.batches = [collate(examples[i : i + args.batch], self.pad)
                        for i in range(0, len(examples) - args.batch + 1, args.batch)]  # fmt: skip
        rows = [Row(name) for name in ("pretrained", "dense LoRA", "sparse LoRA")]
        with phase(f"before fine-tuning: {len(self.problems)} test problems"):
            self._score(rows[0], self.sparse)
        with phase(f"estimator: SVD of rank {RANK} of every frozen weight"):
            estimator = slx.SVDEstimator.build(self.sparse, rank=RANK)
        plan = choice.plan(self.sparse.config.num_hidden_layers)
        slx.compile(self.sparse, estimator, plan=plan, backend=args.backend)
        self.dense.forward = torch.compile(self.dense.forward, backend=args.backend)
        for seed in range(args.seeds):
            self._seed(rows, seed)
        self._measure(rows, plan)
        return rows

    def _score(self, row: Row, model: PeftModel) -> None:
        row.losses.append(test_loss(model, self.batches))
        row.accuracies.append(accuracy(model, self.tokenizer, self.problems))

    def _seed(self, rows: list[Row], seed: int) -> None:
        args = self.args
        problems = generate("train", args.steps * args.batch, seed)
        examples = [encode(p, self.tokenizer) for p in problems]
        for row, model in zip(rows[1:], (self.dense, self.sparse), strict=True):
            said = "compile in the first steps, " if seed == 0 else ""
            title = f"seed {seed}, {row.name}: {said}{args.steps} steps of {args.batch} problems"
            with phase(title + ", test"):
                renew_adapters(model, seed)
                driven = [slx.SparsityCallback()] if model is self.sparse else []
                fine_tune(model, examples, self.pad, args, seed, driven)
                self._score(row, model)
                print(f"   test loss {row.losses[-1]:.4f}, exact match {row.accuracies[-1]:.1%}")

    def _measure(self, rows: list[Row], plan: slx.SparsityPlan) -> None:
        """Step time and FLOPs in the sparse phase, and what follows for the whole training."""
        args = self.args
        slx.step(self.sparse, args.steps // 2, args.steps)
        with phase(f"step time: {args.pairs} pairs of steps, dense and in the sparse phase"):
            slow, fast, ratio = step_times(self.dense, self.sparse, self.batches, args.pairs)
        with phase("channels used in one step"):
            share, predictor = flops_shares(self.sparse, self.batches[0], RANK)
            found = overlaps(self.sparse, as_trained(self.batches[0])).values()
            print("  ", slx.explain(self.sparse).worth["verdict"])
        rows[1].step_ms, rows[1].speedup, rows[1].flops = slow, 1.0, 1.0
        rows[2].step_ms, rows[2].speedup, rows[2].flops = fast, ratio, share
        print("\n" + table(rows))
        part = sparse_part(plan, args.steps)
        whole = 1 / (1 - part + part / ratio)
        print(
            f"{part:.0%} of the steps are sparse: without compilation, the whole training is "
            f"{whole:.2f} times as fast."
        )
        print(f"The predictor adds {predictor:.1%} of the dense frozen linears' forward FLOPs.")
        print(
            "Of the channels it chose, "
            f"{statistics.mean(o.found for o in found):.0%} are among the truly largest; "
            f"by chance {statistics.mean(o.chance for o in found):.0%} would be."
        )


def sparse_part(plan: slx.SparsityPlan, steps: int) -> float:
    """The share of the steps that a plan makes sparse."""

    def at(when: Any) -> float:
        return when if isinstance(when, float) else when / steps

    return (1.0 if plan.end_step is None else at(plan.end_step)) - at(plan.start_step)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out is as the model's size suggests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(CHOICES), default="shipped")
    parser.add_argument("--steps", type=int, help="fine-tuning steps of each model")
    parser.add_argument("--batch", type=int, help="problems per step")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--tests", type=int, help="test problems")
    parser.add_argument("--seeds", type=int, help="trainings of each kind")
    parser.add_argument("--pairs", type=int, default=20, help="timed dense/sparse pairs")
    parser.add_argument("--backend", default="inductor", help="inductor, aot_eager or eager")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch", "rate", "tests", "seeds"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(CHOICES[args.model], name))
    return args


def main() -> None:
    """Command line."""
    start = time.perf_counter()
    Demo(parsed()).run()
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
