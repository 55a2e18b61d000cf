"""Two one-sided tests on paired differences: are two ways of training equal to within a margin?

Schuirmann (1987): at level 0.05 they are if the 90 % interval of the mean difference lies inside
the margin. Student's t comes from its own distribution function, so nothing but Python is needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
FEWEST = 5  # pairs that equivalence is claimed from; fewer give an interval and no verdict


@dataclass(frozen=True)
class Verdict:
    """``low`` to ``high``: the 90 % interval of the mean difference, in the scores' unit."""

    delta: float
    n: int
    low: float
    high: float

    @property
    def equivalent(self) -> bool:
        """Whether the two are equal to within ``delta`` at level 0.05."""
        return self.n >= FEWEST and -self.delta < self.low and self.high < self.delta


def margin(n: int) -> float:
    """The margin in points: 1.0, and 0.5 from ten pairs on."""
    return 0.5 if n >= 10 else 1.0


def paired_tost(first: Sequence[float], second: Sequence[float], delta: float) -> Verdict:
    """Test ``first - second``, pair by pair.

    Raises:
        ValueError: fewer than two pairs, or lists of different lengths.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"{len(first)} and {len(second)} scores; allowed: at least two pairs of scores"
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    half = t_quantile(1 - LEVEL, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Verdict(delta, n, mean - half, mean + half)


def t_quantile(p: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below with probability p,
    for p in [0.5, 1); found by bisection."""
    low, high = 0.0, 1.0
    while t_below(high, freedom) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_below(t: float, freedom: int) -> float:
    """The probability that Student's t stays below ``t >= 0``.

    The closed sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, for whole degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 1.0 if freedom % 2 == 0 else cosine
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if freedom % 2 == 0:
        return 0.5 + 0.5 * sine * total
    within = angle + (sine * total if freedom > 1 else 0.0)
    return 0.5 + within / math.pi
