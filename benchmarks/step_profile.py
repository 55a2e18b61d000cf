"""Where the time of one compiled training step goes, dense and sparse, by kind of work.

    python -m benchmarks.step_profile --preset cpu-small --json F

Kinds: ``matmul``, ``attention`` (scaled dot product), ``selection`` (top k, sort), ``other ATen``
(everything else that has a name of its own, the optimizer included), and ``fused`` for the rest:
the kernels that Inductor generates, which hold gathers, norms, pointwise functions and the loss,
and what Python adds. Steps of the two models take turns; figures are medians over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import measuring, peers
from benchmarks.presets import PRESETS
from benchmarks.step_time import BASELINE, OURS, Peer

KINDS = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "selection": ("aten::topk", "aten::sort"),
}


def kind_of(name: str) -> str:
    """The kind of work that a profiled operator does."""
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other ATen" if name.startswith("aten::") else "fused"


def profiled(peer: Peer, batch: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of one step by kind. Nested operators count for the innermost one."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        took = peer.step(batch)["step"] * 1e3
    spent = dict.fromkeys((*KINDS, "other ATen"), 0.0)
    for event in found.key_averages():
        kind = kind_of(event.key)
        if kind != "fused":
            spent[kind] += event.self_cpu_time_total / 1e3
    return {**spent, "fused": took - sum(spent.values()), "step": took}


def main() -> None:
    """Profile the baseline and ours in turns; print a table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of a step by kind of work, on a CPU.")
    parser.add_argument("--preset", default="cpu-small", choices=list(PRESETS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    names = (BASELINE, OURS, f"{OURS}-trim")
    built, _ = peers.build(preset)
    batch = preset.batches(1)[0]
    running = [Peer(name, built[name], "wall") for name in names]
    for peer in running * 3:
        peer.step(batch)
    turns = [{peer.name: profiled(peer, batch) for peer in running} for _ in range(args.turns)]
    medians = {
        name: {k: round(statistics.median(t[name][k] for t in turns), 2) for k in turns[0][name]}
        for name in names
    }
    print(f"| kind | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for kind in medians[names[0]]:
        print(f"| {kind} | {' | '.join(f'{medians[n][kind]:.1f} ms' for n in names)} |")
    face = {"preset": preset.name, "milliseconds": medians, "turns": args.turns}
    face |= {"machine": measuring.machine("wall"), "versions": measuring.versions()}
    if args.json:
        args.json.write_text(json.dumps(face, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
