"""How far predictions of `slx.cost` are from what is measured, and what a watch costs.

    python -m benchmarks.cost --json F [--preset NAME ...] [--backend inductor]

For each preset: `predicted` (how many times faster a sparse step is by what it has to do) beside
`measured` (dense over sparse seconds of steps in turn), `error` of the former; and `watch_share`,
the time of a probe over that of the sparse steps between two of them, as many as there are by
default.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import sparselora_fx as slx
from benchmarks.support.peers import dense, random_estimator
from benchmarks.support.presets import PRESETS

EVERY = slx.Watch().every
PROBES = 4


def row(name: str, backend: str) -> dict[str, Any]:
    """One preset."""
    torch.compiler.reset()
    preset = PRESETS[name]
    model = dense(preset)
    watch = slx.Watch(every=1, tolerance=1e9)
    slx.compile(model, random_estimator(model), plan=preset.plan(), backend=backend, watch=watch)
    batches = preset.batches()
    for step in range(PROBES):
        slx.step(model, step, 1000)
        model(**batches[step % len(batches)]).loss.backward()
        model.zero_grad()
    history = slx.drift(model)
    bill = slx.cost(model, batches[0])
    assert bill.times is not None
    probe = history.seconds / len(history.probes)
    return {
        "preset": name,
        "predicted": round(bill.predicted_ratio, 4),
        "measured": round(bill.times.ratio, 4),
        "error": round(bill.predicted_ratio / bill.times.ratio - 1, 4),
        "dense_ms": round(bill.times.dense * 1e3, 2),
        "sparse_ms": round(bill.times.sparse * 1e3, 2),
        "probe_ms": round(probe * 1e3, 2),
        "watch_share": round(probe / (EVERY * bill.times.sparse), 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each preset as Markdown."""
    lines = ["| preset | dense step | predicted | measured | watch |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        ratios = f"{row['predicted']:.2f}x | {row['measured']:.2f}x"
        share = f"{row['watch_share']:.1%}"
        lines.append(f"| {row['preset']} | {row['dense_ms']:.3g} ms | {ratios} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print a line each, write the JSON after each."""
    parser = argparse.ArgumentParser(description="Predicted and measured cost of sparse steps.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--preset", nargs="*", choices=list(PRESETS), default=["cpu-small", "tiny", "cpu-small-nf4"]
    )
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.preset:
        rows.append(row(name, args.backend))
        print(json.dumps(rows[-1]), flush=True)
        facts = {
            "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(), "backend": args.backend, "every": EVERY,
            "cases": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
