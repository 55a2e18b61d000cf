"""What a fine-tuned model is worth, and what its steps cost."""

from __future__ import annotations

import statistics
import time

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

import sparselora_fx as slx
from benchmarks.demo.batches import Batch, Problem, as_trained
from benchmarks.demo.word_problems import extract_answer, prompt_of


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


def _timed_step(model: nn.Module, batch: Batch) -> float:
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
        times.append((_timed_step(dense, batch), _timed_step(sparse, batch)))
    slow, fast = zip(*times[3:], strict=True)
    ratios = [a / b for a, b in times[3:]]
    return statistics.median(slow), statistics.median(fast), statistics.median(ratios)


def flops_shares(model: PeftModel, batch: Batch, rank: int) -> tuple[float, float]:
    """FLOPs of a sparse token in one training forward, as shares of the dense frozen linears'.

    First: the frozen linears with the channels that were really used. Second: the predictor on top
    (rank x (inputs + outputs) per token for every weight whose outputs are chosen).
    """
    model.train()
    with slx.record(model) as record:
        model(**as_trained(batch))
    used = {name.removesuffix(".base_layer"): site for name, site in record.sites.items()}
    total = base = predictor = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad or "lm_head" in name:
            continue
        rows, columns = module.weight.shape
        total += rows * columns
        side, kept = used.get(name.removesuffix(".base_layer"), ("", None))
        predictor += rank * (rows + columns) if side == "out" else 0
        rows, columns = (
            (len(kept) if side == "out" else rows),
            (len(kept) if side == "in" else columns),
        )
        base += rows * columns
    return base / total, predictor / total
