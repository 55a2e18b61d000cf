"""What training tells, where somebody looked on: are a region's choices stable, do they depend on
the input; and how far from dense training a watch found it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from torch import Tensor

from sparselora_fx.user.folding import PlanKeys
from sparselora_fx.user.linear_rows import LinearRow
from sparselora_fx.user.record import Recording


@dataclass(frozen=True)
class Stability:
    """One choice of a region over recorded steps.

    Attributes:
        region, choice: a key of a plan; "ffn", "qk" or "v".
        mean, least: of the channels kept in one step, the share that the next one kept, too.
        always: the share that all of them kept.
        dependence: how much the choice depends on the input: 0, always the same channels; 1, as
            different as random choices are. None: not known of how many channels it chose.
    """

    region: str
    choice: str
    mean: float
    least: float
    always: float
    dependence: float | None


def stability(
    recordings: Sequence[Recording], rows: Sequence[LinearRow], keys: PlanKeys
) -> list[Stability]:
    """By region and choice, in the order of the recordings; empty for fewer than two."""
    kept: dict[tuple[str, str], list[Tensor]] = {}
    for one in recordings:
        for region, choices in one.selections.items():
            for choice, channels in choices.items():
                kept.setdefault((region, choice), []).append(channels)
    channels_of = _channels(recordings, rows)
    found = []
    for (region, choice), chosen in kept.items():
        if len(chosen) < 2:
            continue
        sets = [set(channels.tolist()) for channels in chosen]
        shares = [len(a & b) / max(1, len(a)) for a, b in itertools.pairwise(sets)]
        always = len(set.intersection(*sets)) / max(1, len(sets[0]))
        total = channels_of.get((region, choice))
        chance = None if total is None else len(sets[0]) / total
        dependence = None
        if chance is not None and chance < 1:
            dependence = (1 - mean(shares)) / (1 - chance)
        key = keys.key(region.partition("#")[0]) if region else region
        found.append(Stability(key, choice, mean(shares), min(shares), always, dependence))
    return found


def _channels(
    recordings: Sequence[Recording], rows: Sequence[LinearRow]
) -> dict[tuple[str, str], int]:
    """Of how many channels each choice was made: a row's "k of N"s are in the choices' order."""
    of = {(row.region, row.kind): re.findall(r"of (\d+)", row.kept) for row in rows if row.sliced}
    found = {}
    for one in recordings:
        for region, choices in one.selections.items():
            for kind, names in (("ffn", ["ffn"]), ("attention", ["qk", "v"])):
                totals = of.get((region.partition("#")[0], kind), [])
                own = [name for name in choices if name in names]
                found.update({(region, n): int(t) for n, t in zip(own, totals, strict=False)})
    return found


def probe_rows(probes: Sequence[dict[str, Any]], keys: PlanKeys) -> list[tuple[str, ...]]:
    """A watch's probes, as `Drift.to_json` has them: step, gap, the region whose output differs
    most, what was done."""
    rows: list[tuple[str, ...]] = []
    for probe in probes:
        errors = {name: error for name, error in probe["regions"].items() if error is not None}
        worst = max(errors, key=lambda name: errors[name], default=None)
        text = (
            "-" if worst is None else f"{keys.key(worst) if worst else worst} {errors[worst]:.3f}"
        )
        gap = "-" if probe["loss_gap"] is None else f"{probe['loss_gap']:+.4f}"
        rows.append((str(probe["step"]), gap, text, probe["action"] or ""))
    return rows
