"""What the demonstration fine-tunes: the shipped model, or a real one from a package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sparselora_fx as slx
from benchmarks.demo.models import MODEL, SPARSITY, load_model
from benchmarks.evidence.arms import WIDE, ffn
from benchmarks.evidence.model import load


@dataclass(frozen=True)
class Choice:
    """A model with its plan, and the settings that suit its size.

    Attributes:
        load: the model with fresh adapters, which a seed decides, and its tokenizer.
        plan: from the number of blocks.
    """

    load: Callable[[int], tuple[PeftModel, PreTrainedTokenizerBase]]
    plan: Callable[[int], slx.SparsityPlan]
    steps: int
    batch: int
    tests: int
    seeds: int
    rate: float


def _shipped(seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    return load_model(seed), AutoTokenizer.from_pretrained(MODEL)


def _smollm2(seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    base = load(None, torch.float32, "cpu")
    return base.adapted(seed, 16), base.tokenizer


CHOICES = {
    "shipped": Choice(_shipped, lambda layers: slx.SparsityPlan(SPARSITY, start_step=0.05,
                                                               end_step=0.8),
                      steps=100, batch=16, tests=256, seeds=3, rate=2e-3),
    "smollm2": Choice(_smollm2, ffn(0.9, WIDE, end_step=0.8), steps=40, batch=8, tests=64, seeds=1,
                      rate=1e-3),
}  # fmt: skip
