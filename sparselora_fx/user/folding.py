"""Names as plan keys, and many alike ones as a range: ``layers.3-30.mlp``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sparselora_fx.model.frozen_weights import canonical_path


class PlanKeys:
    """The shortest key of a plan that names exactly one module of a model.

    Args:
        names: of all frozen linears.
    """

    def __init__(self, names: Iterable[str]) -> None:
        modules = {
            tuple(parts[:end])
            for parts in (canonical_path(name).split(".") for name in names)
            for end in range(1, len(parts) + 1)
        }
        self.suffixes = Counter(path[i:] for path in modules for i in range(len(path)))

    def key(self, name: str) -> str:
        """A key for a module (or one linear): from its numbered list on ("layers.3.mlp"), or
        longer where that would name others, too."""
        path = tuple(canonical_path(name).split("."))
        numbers = [i for i, part in enumerate(path) if part.isdigit()]
        start = max(numbers[0] - 1, 0) if numbers else len(path) - 1
        while start and self.suffixes[path[start:]] > 1:
            start -= 1
        return ".".join(path[start:])


def fold(keys: Sequence[str]) -> list[str]:
    """Keys that differ in a number alone, as one: ``layers.3.mlp, layers.4.mlp`` ->
    ``layers.3-4.mlp``. In the order in which they begin."""
    paths = [tuple(key.split(".")) for key in keys]
    places = sorted({i for path in paths for i, part in enumerate(path) if part.isdigit()})
    for place in reversed(places):
        groups: dict[tuple[str, ...], list[str]] = {}
        for path in paths:
            number = path[place] if place < len(path) else ""
            alike = (*path[:place], "#", *path[place + 1 :]) if number.isdigit() else path
            groups.setdefault(alike, []).append(number)
        paths = [
            tuple(ranges(numbers) if part == "#" else part for part in alike)
            for alike, numbers in groups.items()
        ]
    return [".".join(path) for path in paths]


def ranges(numbers: Iterable[str]) -> str:
    """``0, 1, 2, 5`` -> ``0-2,5``"""
    runs: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def covering(names: Sequence[str], everything: Iterable[str]) -> list[str]:
    """The modules, up to a numbered block, that hold nothing but the named linears; and linears
    for which there is none. Canonical paths."""
    chosen = {canonical_path(name) for name in names}
    all_paths = {canonical_path(name) for name in everything}
    inside: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for path in all_paths:
        for above in _above(path):
            inside[above] += 1
            wanted[above] += path in chosen
    found: dict[str, None] = {}
    for path in (canonical_path(name) for name in names):
        whole = [above for above in _above(path) if wanted[above] == inside[above]]
        found[whole[-1] if whole else path] = None
    return list(found)


def _above(path: str) -> list[str]:
    """A linear and what holds it, up to the nearest numbered module (or the outermost one)."""
    parts = path.split(".")
    found = []
    for end in range(len(parts), 0, -1):
        found.append(".".join(parts[:end]))
        if parts[end - 1].isdigit():
            break
    return found
