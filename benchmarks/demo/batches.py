"""Word problems as batches of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.demo.word_problems import prompt_of

Problem = dict[str, str]
Example = dict[str, list[int]]
Batch = dict[str, Tensor]
BUCKETS = (64,)  # padded lengths in tokens; every length is one more compiled graph


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids of prompt and answer; labels are -100 on the prompt."""
    prompt = tokenizer(prompt_of(problem), add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + problem["output"], add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(examples: list[Example], pad: int) -> Batch:
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


def as_trained(batch: Batch) -> Batch:
    """The batch with the count of learned tokens that HF Trainer adds: same call, same graph."""
    return {**batch, "num_items_in_batch": (batch["labels"] != -100).sum().float()}
