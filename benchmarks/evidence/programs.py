"""Code: what a small Python program prints. Programs are drawn, run and split by their text."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable

from benchmarks.evidence.items import Item, check_split, split_of

WORDS = (
    "amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", 
    "knoll", "lemon", "maple", "north", "ocean", "pearl", "quartz", "raven", "stone", "tulip",
    "umber", "valley",
)  # fmt: skip


def _numbers(rng: random.Random, size: int = 5) -> list[int]:
    return [rng.randint(1, 20) for _ in range(size)]


def _slice(rng: random.Random) -> str:
    start, stop = rng.randint(0, 2), rng.randint(3, 5)
    return f"values = {_numbers(rng)}\nprint(values[{start}:{stop}])"


def _sort(rng: random.Random) -> str:
    turn = rng.choice(("", ", reverse=True"))
    return f"values = {_numbers(rng)}\nvalues.sort({turn.removeprefix(', ')})\nprint(values)"


def _filter(rng: random.Random) -> str:
    test = rng.choice((f"x > {rng.randint(5, 12)}", "x % 2 == 0", "x % 3 == 0"))
    return f"values = {_numbers(rng, 6)}\nkept = [x for x in values if {test}]\nprint(kept)"


def _text(rng: random.Random) -> str:
    method = rng.choice(("upper()", "title()", f"replace('e', '{rng.choice('aiou')}')"))
    joined = " ".join(rng.sample(WORDS, 3))
    last = f"print('{rng.choice('-+/')}'.join(parts).{method})"
    return f"line = '{joined}'\nparts = line.split()\n{last}"


def _lengths(rng: random.Random) -> str:
    words = rng.sample(WORDS, 4)
    last = f"print(sizes['{rng.choice(words)}'])"
    return f"words = {words}\nsizes = {{w: len(w) for w in words}}\n{last}"


def _loop(rng: random.Random) -> str:
    start, step = rng.randint(0, 9), rng.randint(1, 5)
    return (
        f"total = {start}\nfor i in range({rng.randint(2, 5)}):\n    total += {step}\nprint(total)"
    )


def _branch(rng: random.Random) -> str:
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    first, second = rng.sample(WORDS, 2)
    test = rng.choice(("<", ">", "=="))
    return f"a, b = {a}, {b}\nif a {test} b:\n    print('{first}')\nelse:\n    print('{second}')"


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _slice, _sort, _filter, _text, _lengths, _loop, _branch,
)  # fmt: skip


def printed(program: str) -> str:
    """What a program of ours prints, without the last line's end."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "program", "exec"), {})
    return out.getvalue().rstrip("\n")


def items(split: str, count: int, seed: int) -> list[Item]:
    """``count`` different programs and their output."""
    check_split(split)
    rng = random.Random(f"programs-{split}-{seed}")
    found: dict[str, Item] = {}
    while len(found) < count:
        program = rng.choice(KINDS)(rng)
        if split_of(program) == split:
            prompt = f"Program:\n{program}\nOutput:\n"
            found[program] = Item(prompt, printed(program))
    return list(found.values())
