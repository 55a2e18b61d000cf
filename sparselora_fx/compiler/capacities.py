"""Few lengths for token lists, so that a training run meets few sizes of a step.

A CUDA graph runs at the sizes that it was captured with, and token lists have other lengths in each
batch. Lists may be longer than their tokens: the rest repeats a row, and nobody reads it. So the
first batches are watched, and a few classes are made for batches that vary as they do; a later
batch takes the smallest class that holds it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence

Lengths = tuple[int, ...]  # of each list of a step

CLASSES = 8  # of a token grid, the one for outliers among them
WATCHED = 24  # batches, before classes are made
_ALIKE = 3  # batches of equal lengths, one after the other: they will stay so
_OUTLIERS = 0.03  # more than the longest seen, in the class that is to hold whatever comes
_FILLER = 0.2  # of a step's rows: with more, a step is better taken as it is
_MISSES = 8  # batches that no class holds, until the class for outliers is made anew
_REMADE = 3  # times


class Capacities:
    """The classes of one token grid ``[B, L]`` with always as many lists."""

    def __init__(self) -> None:
        self.seen: deque[Lengths] = deque(maxlen=256)
        self.classes: list[Lengths] = []
        self.outliers: Lengths | None = None
        self.misses = 0
        self.made = 0

    def choose(self, lengths: Sequence[int]) -> Lengths | None:
        """The class for a batch whose lists hold so many tokens: none of its lengths is smaller.

        None where there is none yet, or none that fits: the batch is taken as it is.
        """
        wanted = tuple(lengths)
        if not self._watched(wanted):
            return None
        known = [*self.classes, *([self.outliers] if self.outliers else [])]
        best = min((c for c in known if _holds(c, wanted)), key=sum, default=None)
        if best is not None and sum(best) - sum(wanted) <= _FILLER * sum(wanted):
            return best
        self.misses += 1
        if self.misses >= _MISSES and self.made < _REMADE:
            self._make_outliers()
        return None

    def _watched(self, wanted: Lengths) -> bool:
        """Note a batch; whether there are classes."""
        self.seen.append(wanted)
        latest = list(self.seen)[-_ALIKE:]
        alike = len(latest) == _ALIKE and len(set(latest)) == 1
        if not self.classes and (alike or len(self.seen) >= WATCHED):
            self.classes = classes_of(list(self.seen), CLASSES)
        return bool(self.classes)

    def _make_outliers(self) -> None:
        self.outliers = tuple(
            _more(max(column), _OUTLIERS) for column in zip(*self.seen, strict=True)
        )
        self.misses, self.made = 0, self.made + 1


def classes_of(seen: Sequence[Lengths], limit: int) -> list[Lengths]:
    """At most ``limit`` classes that hold most batches like those seen, with little filler: a box
    around all of them is cut in two where that saves most, then one of the two, and so on. What is
    cut are not the few batches that were seen but many that vary as they do."""
    if len(set(seen)) <= limit:
        return sorted(set(seen))
    groups = [_varied(seen)]
    while len(groups) < limit:
        cuts = [(_filler(group) - cut[0], i, cut) for i, group in enumerate(groups)
                if (cut := _best_cut(group)) is not None]  # fmt: skip
        if not cuts:
            break
        _, place, (_, low, high) = max(cuts, key=lambda found: found[0])
        groups[place : place + 1] = [low, high]
    return [_box(group) for group in groups]


def _varied(seen: Sequence[Lengths]) -> list[Lengths]:
    """Batches with the mean and the covariance of those seen: their mean, and the differences of
    any two, which vary twice as much. A batch's lengths are sums over its samples, and nearly
    normal, as such differences are; and what lists have in common (one is the sum of two) stays."""
    means = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
    return [
        tuple(
            max(1, round(mean + (a - b) / math.sqrt(2)))
            for mean, a, b in zip(means, one, other, strict=True)
        )
        for one, other in itertools.permutations(seen, 2)
    ]


def _best_cut(group: list[Lengths]) -> tuple[int, list[Lengths], list[Lengths]] | None:
    """Filler after the best cut of a group by one of the lengths, and its two parts; None if all
    are alike."""
    best: tuple[int, int, list[Lengths]] | None = None
    for place in range(len(group[0])):
        ordered = sorted(group, key=lambda lengths: lengths[place])
        low, high = _fillers(ordered), _fillers(ordered[::-1])[::-1]
        for i in range(1, len(ordered)):
            if ordered[i - 1][place] < ordered[i][place]:
                filler = low[i - 1] + high[i]
                if best is None or filler < best[0]:
                    best = filler, i, ordered
    return None if best is None else (best[0], best[2][: best[1]], best[2][best[1] :])


def _fillers(ordered: list[Lengths]) -> list[int]:
    """The filler of a box around the first, the first two, ... of some batches."""
    found, most, rows = [], ordered[0], 0
    for count, lengths in enumerate(ordered, 1):
        most, rows = _both(most, lengths), rows + sum(lengths)
        found.append(sum(most) * count - rows)
    return found


def _filler(group: list[Lengths]) -> int:
    return _fillers(group)[-1]


def _box(group: list[Lengths]) -> Lengths:
    return tuple(map(max, zip(*group, strict=True)))


def _both(one: Lengths, other: Lengths) -> Lengths:
    return tuple(map(max, one, other))


def _holds(capacity: Lengths, lengths: Lengths) -> bool:
    return all(map(int.__ge__, capacity, lengths))


def _more(length: int, share: float) -> int:
    return length + int(length * share) + 1
