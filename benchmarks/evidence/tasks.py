"""The tasks, and their batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo.word_problems import generate, prompt_of
from benchmarks.evidence import dictionaries, instructions, programs
from benchmarks.evidence.items import Item, Task, check_split

Batch = dict[str, Tensor]
_WORDINGS = {"train": "train", "validation": "pretrain", "test": "test"}


def _word_problems(split: str, count: int, seed: int) -> list[Item]:
    check_split(split)
    problems = generate(_WORDINGS[split], count, seed)
    return [Item(prompt_of(p), " " + p["output"]) for p in problems]


TASKS = {
    task.name: task
    for task in (
        Task("arithmetic", "arithmetic", "benchmarks/demo/word_problems.py", "Apache-2.0",
             _word_problems),
        Task("code", "code", "benchmarks/evidence/programs.py", "Apache-2.0", programs.items),
        Task("instructions", "instruction following", "benchmarks/evidence/instructions.py",
             "Apache-2.0", instructions.items),
        Task("commonsense", "commonsense", "WordNet 3.0 (Debian: wordnet-base)", "WordNet 3.0",
             dictionaries.commonsense),
        Task("spanish", "another language", "FreeDict (Debian: dict-freedict-eng-spa)", "GPL-2+",
             dictionaries.spanish),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """An item in tokens; ``options``: the first token of each, the right one first."""

    prompt: list[int]
    answer: list[int]
    options: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(item: Item, tokenizer: Any) -> Encoded:
    """Token ids; the answer ends with the tokenizer's end of text."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    firsts = [ids(item.answer)[0], *(ids(o)[0] for o in item.options if o != item.answer)]
    options = tuple(firsts) if item.options else ()
    return Encoded(ids(item.prompt), [*ids(item.answer), tokenizer.eos_token_id], options)


def encoded(task: Task, split: str, count: int, seed: int, tokenizer: Any) -> list[Encoded]:
    """At most ``count`` items in tokens, without those whose options begin with one token."""
    found = [encode(item, tokenizer) for item in task.items(split, count, seed)]
    return [e for e in found if len(set(e.options)) == len(e.options)]


def collate(items: list[Encoded], pad: int, multiple: int = 16) -> Batch:
    """``int64[B, L]`` each, padded on the right to a multiple; labels are -100 on the prompt."""
    length = -(-max(len(e) for e in items) // multiple) * multiple

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded([e.prompt + e.answer for e in items], pad),
        "attention_mask": padded([[1] * len(e) for e in items], 0),
        "labels": padded([[-100] * len(e.prompt) + e.answer for e in items], -100),
    }
