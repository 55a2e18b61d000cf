"""Few lengths for token lists, so that a training run meets few sizes of a step.

A CUDA graph runs at the sizes that it was captured with, and token lists have other lengths in each
batch. Lists may be longer than their tokens: the rest repeats a row, and nobody reads it. So the
first batches are watched, and the lengths they had are merged, cheapest pair first, into a few
classes; a later batch takes the smallest class that holds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

Lengths = tuple[int, ...]  # of each list of a step

CLASSES = 8  # of a token grid, the one for outliers among them
WATCHED = 24  # batches, before classes are made
_ALIKE = 3  # batches of equal lengths, one after the other: they will stay so
_SPARE = 0.01  # more than the longest of a class, where lengths differ
_OUTLIERS = 0.03  # the same for the class that is to hold whatever comes
_FILLER = 0.3  # of a step's rows: with more, a step is better taken as it is
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
            self.classes = classes_of(self.seen, CLASSES - 1)
            if not alike:
                self._make_outliers()
        return bool(self.classes)

    def _make_outliers(self) -> None:
        self.outliers = tuple(
            _more(max(column), _OUTLIERS) for column in zip(*self.seen, strict=True)
        )
        self.misses, self.made = 0, self.made + 1


def classes_of(seen: Iterable[Lengths], limit: int) -> list[Lengths]:
    """At most ``limit`` classes that hold all that was seen, with little filler: the two whose
    merger costs least become one, until few enough are left."""
    counts: dict[Lengths, int] = {}
    for lengths in seen:
        counts[lengths] = counts.get(lengths, 0) + 1
    groups = [(lengths, lengths, n) for lengths, n in counts.items()]  # least, most, batches
    while len(groups) > limit:
        pairs = [(a, b) for i, a in enumerate(groups) for b in groups[:i]]
        one, other = min(pairs, key=lambda pair: _cost(*pair))
        groups = [group for group in groups if group is not one and group is not other]
        least = tuple(map(min, one[0], other[0]))
        groups.append((least, _both(one[1], other[1]), one[2] + other[2]))
    return [
        tuple(
            high if low == high else _more(high, _SPARE)
            for low, high in zip(least, most, strict=True)
        )
        for least, most, _ in groups
    ]


def _cost(one: tuple[Lengths, Lengths, int], other: tuple[Lengths, Lengths, int]) -> int:
    """Filler that a merger of two groups adds."""
    merged = sum(_both(one[1], other[1]))
    return one[2] * (merged - sum(one[1])) + other[2] * (merged - sum(other[1]))


def _both(one: Lengths, other: Lengths) -> Lengths:
    return tuple(map(max, one, other))


def _holds(capacity: Lengths, lengths: Lengths) -> bool:
    return all(map(int.__ge__, capacity, lengths))


def _more(length: int, share: float) -> int:
    return length + int(length * share) + 1
