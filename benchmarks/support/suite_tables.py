"""What `benchmarks.gpu_suite` found, as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "peer", "ratio", "wall_ms", "busy_ms", "busy_share", "busy_ratio", "launches", "host_ms",
    "tokens_per_s", "tflops_4n", "peak_gib", "grad_norm", "loss", "compile_s", "turns",
)  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    """The whole report."""
    machine = found["machine"]
    device = machine["gpu"] or f"{machine['cpu']} (no GPU)"
    lines = [f"# A training step on {device}", ""]
    lines += [f"- {name}: {version}" for name, version in found["versions"].items()]
    lines += [f"- seconds taken: {found['seconds_taken']} of {60 * found['minutes']:.0f}", ""]
    lines += _checks(found)
    for name, preset in found["presets"].items():
        lines += ["", *_preset(name, preset)]
    return "\n".join(lines) + "\n"


def _checks(found: dict[str, Any]) -> list[str]:
    rows = [
        [c["what"], "yes" if c["passed"] else "**NO**", c["error"], c["bound"], c["where"]]
        for c in found["checks"]
    ]
    states = ", ".join(f"{name}: {state}" for name, state in found["checks_state"].items())
    head = ["check", "passed", "relative difference", "bound", "where"]
    return ["## Correctness", "", *_table(head, rows), "", f"({states})"]


def _preset(name: str, preset: dict[str, Any]) -> list[str]:
    lines = [f"## {name}", ""]
    if "preset" in preset:
        known = preset["preset"]
        batch, shape = known["batch"], known["shape"]
        lines += [
            f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
            f"{batch['samples']} x {batch['length']} tokens, {batch['tokens_with_loss']} of each "
            f"sample with loss; FLOP ratio {known['flop_ratio']}, with `trim_logits` "
            f"{known['flop_ratio_trimmed']}; {preset['state']}, "
            f"{preset.get('compiling_beside', 0)} processes compiled beside.",
            "",
        ]
    rows = preset.get("rows", [])
    measured = [row for row in rows if "wall_ms" in row]
    cells = [[_cell(value) for value in _values(row, measured[0])] for row in measured]
    lines += _table(list(COLUMNS), cells) if cells else []
    for row in rows:
        if "wall_ms" not in row:
            lines.append(f"\n{row['peer']}: not measured: {row.get('not_measured', 'no time')}")
    return lines + [f"    {line}" for line in preset.get("tail", [])]


def _values(row: dict[str, Any], base: dict[str, Any]) -> list[Any]:
    """A row in the order of the columns, with the baseline's busy time over its own."""
    if row.get("busy_ms") and base.get("busy_ms"):
        row = {**row, "busy_ratio": round(base["busy_ms"] / row["busy_ms"], 3)}
    return [row.get(column) for column in COLUMNS]


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
