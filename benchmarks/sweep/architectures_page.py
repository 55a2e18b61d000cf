"""Write docs/architectures.md from benchmarks/results/architectures.json."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]

_HEAD = """# Architectures

What the matcher does on every architecture of five of transformers' auto-mappings, each as a tiny
random model with LoRA on its linears. Made by
`python -m benchmarks.architectures --json --page` from
[the results](../benchmarks/results/architectures.json); do not edit.

- **plain**: whether `torch.compile` alone trains the model.
- **FFN**: frozen linears outside attentions that are sliced, of those that ran. Stacks of experts
  (one weight for all experts) are no linears: they stay dense, and are counted in a column of
  their own. State-space and convolution layers have no region.
- **attention**: attention modules with a sliced region, of those that ran.
- **right**: loss and every adapter gradient of a sliced step equal those of the masked-dense step,
  to 1e-9 in fp64 (or to the model's own rounding, where it computes in fp32 inside).
- **zero**: with sparsity 0, loss and gradients are those of plain `torch.compile`, bit for bit.
  Rows made with `--quick --backend eager` are compared with the model's own eager step first, whose
  bits that backend should keep, and with plain `torch.compile` if they differ.
- Rows of the result file carry a hash of the library's sources at their run (`code`) and the
  backend; `python -m benchmarks.architectures` repeats those of other sources.
- A note that begins with `CompileError` is a refusal: the step raises it, with the remedy.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page, as Markdown."""
    rows = result["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [_HEAD, f"Versions: {versions}.\n", "## Counts\n", _counts(rows, tasks)]
    for task in tasks:
        parts += [f"\n## {task}\n", _table([row for row in rows if row["task"] == task])]
    parts += ["\n## Why linears stay dense\n", _reasons(rows)]
    return "\n".join(parts)


def ran(row: Row) -> bool:
    """Whether a row is about a model that plain `torch.compile` trains."""
    return not row.get("error") and row.get("plain", "trains") == "trains"


def refused(row: Row) -> bool:
    """Whether the sliced step raised an error that tells the user what to do."""
    return str(row.get("sparse", "")).startswith("CompileError")


def whole(row: Row, kind: str) -> bool | None:
    """Whether every FFN linear or attention of a row is sliced; None if it has none."""
    pair = row.get("attentions") if kind == "attention" else row.get("linears", {}).get("ffn")
    done, total = pair or (0, 0)
    return None if total == 0 else done == total


def summary(rows: list[Row]) -> dict[str, int]:
    """Counts of one task."""
    good = [row for row in rows if ran(row)]
    ffn = [whole(row, "ffn") for row in good]
    attention = [whole(row, "attention") for row in good]
    return {
        "architectures": len(rows),
        "not built": sum(bool(row.get("error")) for row in rows),
        "plain trains": len(good),
        "right": sum(row.get("right") is True for row in good),
        "wrong": sum(row.get("right") is False for row in good),
        "refused": sum(refused(row) for row in good),
        "failed": sum("sparse" in row and not refused(row) for row in good),
        "zero bit-equal": sum(row.get("zero") is True for row in good),
        "zero not checked": sum("zero" not in row for row in good),
        "with FFN linears": sum(f is not None for f in ffn),
        "every FFN sliced": sum(f is True for f in ffn),
        "with attention": sum(a is not None for a in attention),
        "every attention sliced": sum(a is True for a in attention),
    }


def _counts(rows: list[Row], tasks: list[str]) -> str:
    columns = {task: summary([row for row in rows if row["task"] == task]) for task in tasks}
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(str(columns[t][name]) for t in tasks) + " |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    lines = [
        "| model | plain | FFN | attention | expert stacks | right | zero | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ffn = _pair(row.get("linears", {}).get("ffn"))
        attention = _pair(row.get("attentions"))
        plain = "-" if row.get("error") else row.get("plain", "trains")
        plain = plain if plain in ("-", "trains") else "no"
        cells = [row["model"], plain, ffn, attention, str(row.get("experts") or "-")]
        cells += [_word(row.get("right")), _word(row.get("zero")), _note(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(pair: Any) -> str:
    return f"{pair[0]}/{pair[1]}" if pair and pair[1] else "-"


def _word(value: Any) -> str:
    return {True: "yes", False: "**no**"}.get(value, "-")


def _note(row: Row) -> str:
    plain = row.get("plain", "trains")
    said = row.get("error") or (plain if plain != "trains" else None) or row.get("sparse")
    if said:
        return said.replace("|", "\\|")[:110]
    reasons: Counter[str] = Counter()
    for kind in ("ffn", "attention"):
        if whole(row, kind) is False:
            for reason, count in row.get("dense", {}).get(kind, {}).items():
                reasons[plainly(reason)] += count
    return "; ".join(reason for reason, _ in reasons.most_common(2))


def plainly(reason: str) -> str:
    """A reason without the name of the node it was about."""
    return reason.split(" (")[0]


def _reasons(rows: list[Row]) -> str:
    counts: Counter[tuple[str, str]] = Counter()
    models: dict[tuple[str, str], set[str]] = {}
    for row in filter(ran, rows):
        for kind, reasons in row.get("dense", {}).items():
            for reason, count in reasons.items():
                key = (kind, plainly(reason))
                counts[key] += count
                models.setdefault(key, set()).add(row["model"])
    lines = ["| part | reason | linears | models |", "|---|---|---|---|"]
    for (kind, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"| {kind} | {reason} | {count} | {len(models[kind, reason])} |")
    return "\n".join(lines) + "\n"
