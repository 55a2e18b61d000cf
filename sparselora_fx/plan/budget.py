"""Choose a level for every region of a sensitivity table under one budget.

A multiple-choice knapsack: per region one level or none, loss changes and saved work taken as
sums. It is solved exactly, by keeping after each region every combination that no other beats in
both (the Pareto frontier). A loss that falls counts like one that rises: either says that the
region matters, and training finds such a gain by itself, without paying for it in channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselora_fx.errors import PlanError
from sparselora_fx.plan.sensitivity_table import Measurement, SensitivityTable

# A frontier longer than this is thinned evenly, ends kept: the result may then miss the optimum by
# less than one part in this many of the work saved. Models of equal blocks stay far below it.
MAX_FRONTIER = 100_000

Places = NDArray[np.signedinteger]  # positions, or counts of multiply-adds
Harm = NDArray[np.float64]


class Choice(NamedTuple):
    """The rows chosen (at most one a region), and the regions that stay dense."""

    rows: list[Measurement]
    dense: list[tuple[str, ...]]  # the plan keys of each

    def sparsity(self) -> dict[str, float]:
        """Plan keys to sparsity; regions that stay dense are named too."""
        found = {key: 0.0 for keys in self.dense for key in keys}
        return found | {key: row.level for row in self.rows for key in row.keys}


def choose(
    table: SensitivityTable, *, flops: float | None = None, max_loss: float | None = None
) -> Choice:
    """The best levels under one of two budgets.

    Args:
        table: from `sensitivity`.
        flops: keep at most this share of the base FLOPs of a sparse token, in [0, 1]; the least
            sum of absolute loss changes that does so.
        max_loss: the absolute loss changes of the chosen rows sum to at most this; saves the most
            work that does so.

    Raises:
        PlanError: not exactly one budget, a budget out of range, or one that no choice meets.
    """
    if (flops is None) == (max_loss is None):
        raise PlanError(f"give exactly one of flops and max_loss, got {flops!r} and {max_loss!r}")
    _check_number("flops", flops, 0.0, 1.0)
    _check_number("max_loss", max_loss, 0.0, float("inf"))
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in table.rows:
        if row.loss_change == row.loss_change:  # a NaN loss is no choice
            groups.setdefault((row.region, row.kind), []).append(row)
    options = list(groups.values())
    saved, harm, back = _frontier(options)
    if flops is not None:
        enough = np.flatnonzero(saved >= (1 - flops - 1e-9) * table.base_flops)
        if not enough.size:
            least = 1 - saved[-1] / table.base_flops
            raise PlanError(
                f"flops={flops:g} cannot be reached: with every region at its highest measured "
                f"level {least:.3f} of the base FLOPs remain; measure higher levels or more "
                f"regions, or ask for at least {least:.3f}"
            )
        at = int(enough[0])
    else:
        assert max_loss is not None
        at = int(np.flatnonzero(harm <= max_loss)[-1])
    return _trace(options, back, at)


def _frontier(options: list[list[Measurement]]) -> tuple[Places, Harm, list[Places]]:
    """Rising ``saved`` and ``harm`` of the undominated combinations, and how to get back.

    ``back[i]`` holds, for each of the combinations after region i, its predecessor times the
    number of options plus the option taken (0: dense).
    """
    saved: Places = np.zeros(1, np.int64)
    harm: Harm = np.zeros(1, np.float64)
    back: list[Places] = []
    for rows in options:
        work = np.array([0, *(row.saved for row in rows)], np.int64)
        loss = np.array([0.0, *(abs(row.loss_change) for row in rows)])
        all_saved = (saved[:, None] + work).ravel()
        all_harm = (harm[:, None] + loss).ravel()
        order = np.lexsort((all_harm, -all_saved))  # most saved first, then least harm
        lowest = np.minimum.accumulate(all_harm[order])
        kept = order[np.concatenate(([True], all_harm[order][1:] < lowest[:-1]))][::-1]
        if len(kept) > MAX_FRONTIER:
            kept = kept[np.linspace(0, len(kept) - 1, MAX_FRONTIER).astype(int)]
        saved, harm = all_saved[kept], all_harm[kept]
        back.append(kept)
    return saved, harm, back


def _trace(options: list[list[Measurement]], back: list[Places], at: int) -> Choice:
    rows: list[Measurement] = []
    dense: list[tuple[str, ...]] = []
    for group, kept in zip(reversed(options), reversed(back), strict=True):
        at, taken = divmod(int(kept[at]), len(group) + 1)
        if taken:
            rows.append(group[taken - 1])
        else:
            dense.append(group[0].keys)
    return Choice(rows[::-1], dense[::-1])


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise PlanError(f"{name} is {value!r}; allowed: a number from {low:g} to {high:g}")
