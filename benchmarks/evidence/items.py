"""What a task is made of: items with one right answer, split by what they are about."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One question.

    With ``options`` (the answer among them) the option is scored that the model would begin with;
    without, the answer counts if greedy decoding would write exactly it and then end.
    """

    prompt: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A kind of question.

    ``items(split, count, seed)`` gives the same items for the same arguments, and no two splits
    share what an item is about (or, for arithmetic and instructions, a wording).
    """

    name: str
    kind: str
    source: str
    licence: str
    items: Callable[[str, int, int], list[Item]]


def split_of(key: str) -> str:
    """The split of a key, for ever: eight tenths train, a tenth each of the others."""
    digit = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "train" if digit < 8 else SPLITS[digit - 7]


def check_split(split: str) -> None:
    """Raises `ValueError` for a word that is no split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")


def multiple_choice(
    pairs: Sequence[tuple[str, str]],
    split: str,
    count: int,
    seed: int,
    form: str,
    *,
    choices: int = 4,
) -> list[Item]:
    """Items that ask for the word of a text, with other words of the same split to choose from.

    Args:
        pairs: ``(text, word)``, all of one split.
        form: the prompt, with ``{text}`` and ``{options}``.
        choices: options of an item; no two begin with the same two letters.
    """
    rng = random.Random(f"{split}-{seed}")
    words = sorted({word for _, word in pairs})
    chosen = rng.sample(list(pairs), min(count, len(pairs)))
    items = []
    for text, word in chosen:
        options = [word]
        while len(options) < choices:
            other = rng.choice(words)
            if all(other[:2] != option[:2] for option in options):
                options.append(other)
        rng.shuffle(options)
        prompt = form.format(text=text, options=", ".join(options))
        items.append(Item(prompt, word, tuple(options)))
    return items
