"""What `explain` returns: a text, and the same for programs and notebooks."""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparselora_fx.user.folding import PlanKeys, covering, fold
from sparselora_fx.user.linear_rows import LinearRow
from sparselora_fx.user.worth import worth_lines

COLUMNS = 100
_NODE = re.compile(r" \([a-z_0-9]+\)")  # a node's name: other ones in other layers


@dataclass(frozen=True)
class Group:
    """Regions that are alike, or linears that are dense for one reason, as one row.

    Attributes:
        names: keys of a plan, alike ones folded into ranges.
        count: of linears.
        kind, kept, linears: of regions: "ffn" or "attention", "k of N", and which of their linears
            keep rows and which columns.
        note: what else there is to say, or why they are dense.
    """

    names: tuple[str, ...]
    count: int
    kind: str = ""
    kept: str = ""
    linears: str = ""
    note: str = ""


class Explanation(str):
    """The text that `explain` returns, and what it was made of.

    Attributes:
        rows: one for each frozen linear.
        regions: the sliced regions, alike ones as one.
        dense: the dense linears, by reason.
        worth: whether it pays: figures by name, and a ``verdict``.
    """

    rows: tuple[LinearRow, ...]
    regions: tuple[Group, ...]
    dense: tuple[Group, ...]
    worth: dict[str, Any]

    def to_json(self) -> str:
        """Everything, as JSON: ``linears``, ``regions``, ``dense``, ``worth``."""
        return json.dumps(
            {
                "linears": [
                    vars(row) | {"sliced": row.sliced, "status": row.status} for row in self.rows
                ],
                "regions": [vars(group) for group in self.regions],
                "dense": [vars(group) for group in self.dense],
                "worth": self.worth,
            },
            indent=1,
        )

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        heads = ("region", "kind", "kept", "linears")
        body = [(", ".join(g.names), g.kind, g.kept, g.linears + g.note) for g in self.regions]
        parts = [_html_table(heads, body)] if body else []
        why = [(", ".join(g.names), str(g.count), g.note) for g in self.dense]
        parts += [_html_table(("dense", "linears", "why"), why)] if why else []
        parts.append(_html_table(("does it pay?", ""), worth_lines(self.worth)))
        verdict = html.escape(str(self.worth["verdict"]))
        return f"{''.join(parts)}<p><b>{verdict}</b></p>"


def explanation(
    rows: Sequence[LinearRow], worth: dict[str, Any], notes: Sequence[str], *, verbose: bool
) -> Explanation:
    """Write the text: folded, in 100 columns, or (``verbose``) a line for each linear."""
    keys = PlanKeys(row.name for row in rows)
    regions, dense = _regions(rows, keys), _dense(rows, keys)
    lines = _table(rows) if verbose else _sections(rows, regions, dense)
    lines.append(_summary(rows, worth["graphs"], traced=worth["traced"]))
    lines += [f"{name + ':':<20}{text}" for name, text in worth_lines(worth)]
    width = None if verbose else COLUMNS
    lines += [line for note in [*notes, worth["verdict"]] for line in _wrapped(note, width)]
    found = Explanation("\n".join(lines))
    found.rows, found.regions, found.dense = tuple(rows), tuple(regions), tuple(dense)
    found.worth = worth
    return found


def _summary(rows: Sequence[LinearRow], graphs: int, *, traced: bool) -> str:
    linears = [row for row in rows if row.linear]
    done = sum(row.sliced for row in linears)
    what = "traced, none of them run" if traced else "compiled"
    return f"{done} of {len(linears)} frozen linears rewritten; {graphs} graphs {what}"


def _table(rows: Sequence[LinearRow]) -> list[str]:
    """One line for each linear."""
    cells = [("frozen linear", "shape", "region", "kept", "status")]
    for row in rows:
        region = f"{row.region} [{row.kind}]" if row.sliced else "-"
        cells.append((row.name, row.shape, region, row.kept or "-", row.status))
    return _aligned(cells)


def _aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of a table; the last column is as wide as it is."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    ]


def _sections(
    rows: Sequence[LinearRow], regions: Sequence[Group], dense: Sequence[Group]
) -> list[str]:
    lines: list[str] = []
    if regions:
        cells = [("region", "kind", "kept", "linears")]
        cells += [(", ".join(g.names), g.kind, g.kept, g.linears + g.note) for g in regions]
        for line in _aligned(cells):
            lines += _wrapped(line, COLUMNS)
    for group in dense:
        word = "linear" if group.count == 1 else "linears"
        head = f"{', '.join(group.names)} ({group.count} {word})"
        lines += _wrapped(head, COLUMNS) + _wrapped(f"    {group.note}", COLUMNS)
    return lines


def _regions(rows: Iterable[LinearRow], keys: PlanKeys) -> list[Group]:
    found: dict[tuple[str, str], list[LinearRow]] = {}
    for row in rows:
        if row.sliced:
            found.setdefault((row.region, row.kind), []).append(row)
    alike: dict[tuple[str, str, str, str], tuple[list[str], int]] = {}
    for (region, kind), own in found.items():
        parts = []
        for role, word in (("out", "rows"), ("in", "columns")):
            names = [_inside(keys, row.name, region) for row in own if row.role == role]
            parts += [f"{word} of {', '.join(names)}"] if names else []
        notes = "".join(dict.fromkeys(row.note for row in own))
        what = (kind, own[0].kept, "; ".join(parts), _NODE.sub("", notes))
        names, count = alike.get(what, ([], 0))
        alike[what] = ([*names, keys.key(region or own[0].name)], count + len(own))
    return [Group(tuple(fold(names)), count, *what) for what, (names, count) in alike.items()]


def _inside(keys: PlanKeys, name: str, region: str) -> str:
    """A linear's name within its region."""
    key, where = keys.key(name), keys.key(region) if region else ""
    return key.removeprefix(f"{where}.") if where and key != where else key


def _dense(rows: Sequence[LinearRow], keys: PlanKeys) -> list[Group]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.sliced:
            reasons.setdefault(_NODE.sub("", row.status), []).append(row.name)
    everything = [row.name for row in rows]
    return [
        Group(
            tuple(fold([keys.key(name) for name in covering(names, everything)])),
            len(names),
            note=reason,
        )
        for reason, names in reasons.items()
    ]


def _wrapped(line: str, width: int | None) -> list[str]:
    if width is None or len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
