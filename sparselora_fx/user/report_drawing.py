"""One region as a drawing: its linears as boxes, as they are and as they are sliced."""

from __future__ import annotations

from collections.abc import Sequence

from sparselora_fx.user.folding import PlanKeys
from sparselora_fx.user.linear_rows import LinearRow

_WIDTH, _STEP = 300, 70  # of the drawing; from one row of boxes to the next


def drawing_of(rows: Sequence[LinearRow], keys: PlanKeys) -> dict[str, object] | None:
    """The first sliced region, before beside after: input, producers, the function between,
    consumer, output. None: nothing is sliced."""
    first = next((row for row in rows if row.sliced), None)
    if first is None:
        return None
    own = [row for row in rows if (row.region, row.kind) == (first.region, first.kind)]
    name = keys.key(first.region or first.name)
    sides = [_side(own, keys, cut=False), _side(own, keys, cut=True)]
    return {"name": name, "kept": first.kept, "sides": sides}


def _side(own: Sequence[LinearRow], keys: PlanKeys, *, cut: bool) -> dict[str, object]:
    between = "attention" if own[0].kind == "attention" else "pointwise"
    levels = [
        [("input", "", False)],
        [
            (keys.key(r.name).rpartition(".")[2], _shape(r, cut), cut)
            for r in own
            if r.role == "out"
        ],
        [(between, own[0].kept if cut else "all channels", False)],
        _boxes(own, "in", keys, cut=cut),
        [("output", "", False)],
    ]
    boxes: list[dict[str, object]] = []
    lines: list[str] = []
    above: list[tuple[float, int]] = []
    for number, level in enumerate(level for level in levels if level):
        width = (_WIDTH - 10) / len(level) - 6
        here = []
        for place, (name, shape, is_cut) in enumerate(level):
            x, y = 5 + place * (width + 6), 5 + number * _STEP
            boxes.append(
                {"x": x, "y": y, "width": width, "name": name, "shape": shape, "cut": is_cut}
            )
            here.append((x + width / 2, y))
        lines += [f"M{a:g} {b + 40} L{c:g} {d}" for a, b in above for c, d in here]
        above = here
    words = ", then ".join(" and ".join(name for name, *_ in level) for level in levels if level)
    title = "after: sliced" if cut else "before: dense"
    height = 5 + _STEP * sum(bool(level) for level in levels)
    return {"title": title, "boxes": boxes, "lines": lines, "height": height, "words": words}


def _boxes(
    own: Sequence[LinearRow], role: str, keys: PlanKeys, *, cut: bool
) -> list[tuple[str, str, bool]]:
    """Name, shape and whether it is sliced, of the linears with one role."""
    found = [row for row in own if row.role == role]
    return [(keys.key(row.name).rpartition(".")[2], _shape(row, cut), cut) for row in found]


def _shape(row: LinearRow, cut: bool) -> str:
    """``112 x 48``, or with what is kept of the sliced side."""
    outputs, _, inputs = row.shape.partition("x")
    if not cut:
        return f"{outputs} x {inputs}"
    kept = f"kept of {outputs if row.role == 'out' else inputs}"
    return f"{kept} x {inputs}" if row.role == "out" else f"{outputs} x {kept}"
