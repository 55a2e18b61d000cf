"""Instruction following: lists of words to be written in a form that four checkers can test.

Words and wordings of the splits are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evidence.items import Item, check_split

WORDS = {
    "train": (
        "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island",
        "jacket", "kitchen", "ladder", "mirror", "needle", "orange", "pencil", "queen", "rabbit",
        "saddle", "table", "umbrella", "violin", "window", "yellow", "zebra", "anchor", "button",
        "castle", "doctor", "eagle", "feather", "guitar", "harbour", "insect", "jungle", "kettle",
    ),
    "validation": (
        "bottle", "carpet", "desert", "flower", "glacier", "helmet", "iron", "lantern", "market",
        "ocean", "pillow", "river", "silver", "tower", "village", "winter",
    ),
    "test": (
        "autumn", "basket", "copper", "diamond", "elbow", "fountain", "goose", "honey", "ivory",
        "jewel", "lemon", "mountain", "night", "oyster", "puzzle", "rocket", "statue", "tunnel",
        "valley", "wagon",
    ),
}  # fmt: skip
TAKE = {
    "train": {"all": "all the words", "first": "only the first two words"},
    "validation": {"all": "every word", "first": "just the first two words"},
    "test": {"all": "each word", "first": "the first two words and no others"},
}
ORDER = {
    "train": {
        "given": "in the order given",
        "back": "in reverse order",
        "abc": "in alphabetical order",
    },
    "validation": {
        "given": "without changing the order",
        "back": "from last to first",
        "abc": "from a to z",
    },
    "test": {
        "given": "keeping their order",
        "back": "backwards",
        "abc": "sorted by the alphabet",
    },
}
CASE = {
    "train": {
        "upper": "in capital letters",
        "lower": "in small letters",
        "title": "each with a capital first letter",
    },
    "validation": {
        "upper": "in upper case",
        "lower": "in lower case",
        "title": "each beginning with a capital",
    },
    "test": {
        "upper": "all in capitals",
        "lower": "all in lower-case letters",
        "title": "with a capital at the start of each",
    },
}
BETWEEN = {", ": "a comma", " - ": "a dash", "; ": "a semicolon", " / ": "a slash"}
FORM = {
    "train": "Write {take} {order}, {case}, with {between} between them.",
    "validation": "Give me {take} {order}, {case}; put {between} between them.",
    "test": "Please list {take}, {order}, {case}, separated by {between}.",
}


@dataclass(frozen=True)
class Request:
    """What is asked: which words, in which order and case, with what between them."""

    words: tuple[str, ...]
    take: str
    order: str
    case: str
    between: str

    def kept(self) -> list[str]:
        """The words asked for, in the order asked for, in small letters."""
        kept = list(self.words if self.take == "all" else self.words[:2])
        return sorted(kept) if self.order == "abc" else kept[::-1] if self.order == "back" else kept

    def answer(self) -> str:
        """The one text that follows the request."""
        return self.between.join(getattr(word, self.case)() for word in self.kept())


def broken(request: Request, text: str) -> list[str]:
    """The parts of a request that a text does not follow, each tested by itself."""
    parts = text.strip().split(request.between)
    small = [part.lower() for part in parts]
    wanted = request.kept()
    return [
        part
        for part, kept in (
            ("take", sorted(small) == sorted(wanted)),
            ("order", _in_order([word for word in small if word in wanted], wanted)),
            ("case", all(part == getattr(part, request.case)() for part in parts)),
            ("between", len(parts) == len(wanted)),
        )
        if not kept
    ]


def _in_order(found: Sequence[str], wanted: Sequence[str]) -> bool:
    places = [wanted.index(word) for word in found]
    return places == sorted(places)


def request_of(split: str, rng: random.Random) -> Request:
    """A random request of a split."""
    words = tuple(rng.sample(WORDS[split], rng.randint(3, 4)))
    take = rng.choice(list(TAKE[split]))
    return Request(words, take, rng.choice(list(ORDER[split])), rng.choice(list(CASE[split])),
                   rng.choice(list(BETWEEN)))  # fmt: skip


def items(split: str, count: int, seed: int) -> list[Item]:
    """``count`` requests with the text that follows them."""
    check_split(split)
    rng = random.Random(f"instructions-{split}-{seed}")
    found = []
    for _ in range(count):
        r = request_of(split, rng)
        asked = FORM[split].format(
            take=TAKE[split][r.take],
            order=ORDER[split][r.order],
            case=CASE[split][r.case],
            between=BETWEEN[r.between],
        )
        prompt = f"{asked}\nWords: {' '.join(r.words)}\nAnswer:"
        found.append(Item(prompt, " " + r.answer()))
    return found
