"""The demonstration: LoRA fine-tuning of the shipped model, sparse beside dense, on a CPU.

Both runs start from the same seed, see the same batches through HF Trainer and are compiled the
same way (`torch.compile(model.forward)` against `sparselora_fx.compile`). Answers are generated
greedily by the dense model in eval mode and compared as numbers, on wordings that training has
never shown. Step time is forward + backward of one batch, measured dense, sparse, dense, sparse.

    python -m benchmarks.demo
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sparselora_fx as slx
from benchmarks.demo.word_problems import extract_answer, generate, prompt_of
from benchmarks.support.overlap import overlaps

MODEL = Path(__file__).resolve().parent / "model"
BUCKETS = (64,)  # padded lengths in tokens; every length is one more compiled graph
RANK = 8
SPARSITY = {
    "layers.0.mlp": 0.5,
    "layers.1.mlp": 0.9,
    "layers.2.mlp": 0.9,
    "layers.3.mlp": 0.9,
    "layers.4.mlp": 0.75,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
Problem = dict[str, str]
Batch = dict[str, Tensor]


@dataclass
class Row:
    """One row of the final table; times in milliseconds, shares and accuracies from 0 to 1."""

    name: str
    loss: float
    accuracy: float
    step_ms: float | None = None
    speedup: float | None = None
    base_flops: float | None = None


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Says what is going on, and how many seconds it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def load_model(seed: int) -> PeftModel:
    """The shipped model in fp32 with fresh LoRA adapters (rank 16) on its attention linears."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of prompt and answer; labels are -100 on the prompt."""
    prompt = tokenizer(prompt_of(problem), add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + problem["output"], add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(examples: list[dict[str, list[int]]], pad: int) -> Batch:
    """Pads on the right to the smallest bucket that fits; tensors are (batch, bucket) int64."""
    longest = max(len(e["input_ids"]) for e in examples)
    length = min((b for b in BUCKETS if b >= longest), default=longest)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([e[key] + [fill] * (length - len(e[key])) for e in examples])

    lengths = torch.tensor([[len(e["input_ids"])] for e in examples])
    mask = (torch.arange(length)[None] < lengths).long()
    return {
        "input_ids": padded("input_ids", pad),
        "attention_mask": mask,
        "labels": padded("labels", -100),
    }


@torch.no_grad()
def test_loss(model: PeftModel, batches: list[Batch]) -> float:
    """Mean loss on the answers in nats per token; the dense model in eval mode, not compiled."""
    model.eval()
    weights = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [model.get_base_model()(**batch).loss.item() for batch in batches]
    return sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)


@torch.no_grad()
def accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem],
             size: int = 64) -> float:  # fmt: skip
    """Share of problems whose last generated number is the answer; greedy, `size` at a time."""
    model.eval()
    right = 0
    for start in range(0, len(problems), size):
        chunk = problems[start : start + size]
        texts = [prompt_of(p) for p in chunk]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=False, return_token_type_ids=False)  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        replies = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        pairs = zip(replies, chunk, strict=True)
        right += sum(extract_answer(reply) == p["answer"] for reply, p in pairs)
    return right / len(problems)


def fine_tune(
    model: PeftModel, examples: list[dict[str, list[int]]], pad: int, args: argparse.Namespace
) -> None:
    """Trains the adapters with HF Trainer; batches and their order follow the seed."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=examples,
                          data_collator=lambda batch: collate(batch, pad))  # fmt: skip
        trainer.train()


def as_trained(batch: Batch) -> Batch:
    """The batch with the count of learned tokens that HF Trainer adds: same call, same graph."""
    return {**batch, "num_items_in_batch": (batch["labels"] != -100).sum().float()}


def timed_step(model: nn.Module, batch: Batch) -> float:
    """Milliseconds of one forward and backward."""
    inputs = as_trained(batch)
    start = time.perf_counter()
    model(**inputs).loss.backward()
    elapsed = 1e3 * (time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return elapsed


def step_times(
    dense: nn.Module, sparse: nn.Module, batches: list[Batch], pairs: int
) -> tuple[float, float, float]:
    """Median step time of each in milliseconds, and the median of the pairwise ratios.

    Three warm-up pairs are dropped; then dense and sparse alternate on the same batch.
    """
    dense.train()
    sparse.train()
    times = []
    for i in range(pairs + 3):
        batch = batches[i % len(batches)]
        times.append((timed_step(dense, batch), timed_step(sparse, batch)))
    slow, fast = zip(*times[3:], strict=True)
    ratios = [a / b for a, b in times[3:]]
    return statistics.median(slow), statistics.median(fast), statistics.median(ratios)


def flops_shares(model: PeftModel, batch: Batch) -> tuple[float, float]:
    """FLOPs of one training forward, as shares of the dense frozen linears' FLOPs.

    First: the frozen linears with the channels that were really used. Second: the predictor on top
    (rank x (inputs + outputs) per token for every weight whose outputs are chosen).
    """
    model.train()
    with slx.record(model) as record:
        model(**as_trained(batch))
    used = {name.removesuffix(".base_layer"): site for name, site in record.sites.items()}
    total = base = predictor = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        rows, columns = module.weight.shape
        total += rows * columns
        side, kept = used.get(name.removesuffix(".base_layer"), ("", None))
        predictor += RANK * (rows + columns) if side == "out" else 0
        rows, columns = (
            (len(kept) if side == "out" else rows),
            (len(kept) if side == "in" else columns),
        )
        base += rows * columns
    return base / total, predictor / total


def print_table(rows: list[Row]) -> None:
    """The result, one line per model."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = ("test loss", "exact match", "step time", "speed-up", "base FLOPs")
    print("\n" + " " * 14 + "".join(f"{head:>13}" for head in heads))
    for row in rows:
        step = "-" if row.step_ms is None else f"{row.step_ms:.0f} ms"
        cells = (f"{row.loss:.4f}", f"{row.accuracy:.1%}", step)
        cells += (cell(row.speedup, ".2f"), cell(row.base_flops, ".1%"))
        print(f"{row.name:<14}" + "".join(f"{text:>13}" for text in cells))


def run(args: argparse.Namespace) -> list[Row]:
    """The whole job; returns the rows of the table."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train = [encode(p, tokenizer) for p in generate("train", args.steps * args.batch, args.seed)]
    problems = generate("test", args.test, args.seed)
    pad = tokenizer.pad_token_id
    batches = [collate([encode(p, tokenizer) for p in problems[i : i + args.batch]], pad)
               for i in range(0, len(problems) - args.batch + 1, args.batch)]  # fmt: skip

    def score(name: str, model: PeftModel) -> Row:
        return Row(name, test_loss(model, batches), accuracy(model, tokenizer, problems))

    sparse, dense = load_model(args.seed), load_model(args.seed)
    with phase(f"before fine-tuning: {len(problems)} test problems"):
        rows = [score("pretrained", sparse)]
    with phase(f"estimator: SVD of rank {RANK} of every frozen weight"):
        estimator = slx.SVDEstimator.build(sparse, rank=RANK)
    plan = slx.SparsityPlan(SPARSITY, tokens="all", start_step=0, channel_multiple=16)
    slx.compile(sparse, estimator, plan=plan, backend=args.backend)
    dense.forward = torch.compile(dense.forward, backend=args.backend)
    for name, model in (("dense LoRA", dense), ("sparse LoRA", sparse)):
        with phase(
            f"{name}: compile in the first step, then {args.steps} steps of {args.batch} problems"
        ):
            fine_tune(model, train, pad, args)
        with phase(f"{name}: test"):
            rows.append(score(name, model))
    with phase(f"step time: {args.pairs} pairs of steps"):
        slow, fast, ratio = step_times(dense, sparse, batches, args.pairs)
    with phase("channels used in one step"):
        share, predictor = flops_shares(sparse, batches[0])
        found = overlaps(sparse, as_trained(batches[0])).values()
        print("  ", slx.explain(sparse).worth["verdict"])
    rows[1].step_ms, rows[1].speedup, rows[1].base_flops = slow, 1.0, 1.0
    rows[2].step_ms, rows[2].speedup, rows[2].base_flops = fast, ratio, share
    print_table(rows)
    print(f"The predictor adds {predictor:.1%} of the dense frozen linears' forward FLOPs.")
    print(
        "Of the channels it chose, "
        f"{statistics.mean(o.found for o in found):.0%} are among the truly largest; "
        f"by chance {statistics.mean(o.chance for o in found):.0%} would be."
    )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="fine-tuning steps of each model")
    parser.add_argument("--batch", type=int, default=16, help="problems per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--test", type=int, default=256, help="test problems")
    parser.add_argument("--pairs", type=int, default=20, help="timed dense/sparse pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="inductor, aot_eager or eager")
    start = time.perf_counter()
    run(parser.parse_args())
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
