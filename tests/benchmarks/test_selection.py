"""The predictor finds channels that matter on the shipped model, far better than chance."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import AutoTokenizer

import sparselora_fx as slx
from benchmarks.demo.models import MODEL, SPARSITY, load_model
from benchmarks.demo.word_problems import generate, prompt_of
from benchmarks.support.overlap import overlaps


def _batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Prompts of word problems, cut to one length: int64[rows, at most tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [tokenizer(prompt_of(p))["input_ids"] for p in generate("test", rows, seed=0)]
    length = min(tokens, *(len(row) for row in ids))
    return {"input_ids": torch.tensor([row[:length] for row in ids])}


@pytest.mark.slow
def test_overlap_with_the_true_top_channels_beats_chance() -> None:
    model = load_model(seed=0)
    estimator = slx.SVDEstimator.build(model, rank=8, progress=False)
    plan = slx.SparsityPlan(dict.fromkeys(SPARSITY, 0.9), tokens="all", start_step=0)
    slx.compile(model, estimator, plan=plan, backend="eager")
    found = overlaps(model, _batch(32, 24))
    assert len(found) == len(SPARSITY)
    print({region: f"{o.found:.2f}" for region, o in found.items()})
    chance = statistics.mean(o.chance for o in found.values())
    assert statistics.mean(o.found for o in found.values()) > 1.7 * chance
