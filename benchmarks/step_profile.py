"""Where the time of one compiled training step goes, dense and sparse, by kind of work.

    python -m benchmarks.step_profile --preset cpu-small --json F

Kinds: ``matmul`` of frozen weights and the output head, ``small matmul`` (adapters and predictor:
one dimension is no more than four times the LoRA rank), ``attention`` (scaled dot product),
``selection`` (top k, sort), ``loss``; then the kernels that Inductor generates: ``moving`` those
that gather, place or merge tokens or channels beside what they compute (rotations, norms and
activations are fused into them), ``pointwise`` the others; ``other ATen`` (the optimizer and
gradient accumulation, mostly), and ``rest``: Python, guards, the profiler. Steps of the models take
turns; figures are medians over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor_config
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_time import BASELINE, OURS
from benchmarks.support import measuring, peers
from benchmarks.support.presets import PRESETS
from benchmarks.support.stepping import Peer

MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl", "mkldnn")
ATTENTION = ("scaled_dot_product", "flash_attention")
SELECTION = ("aten::topk", "aten::sort")
MOVING = (
    "gather_tokens", "gather_or_zero_tokens", "scatter_two_lists", "scatter_tokens",
    "gather_channels", "scatter_channels", "sliced_linear",
)  # fmt: skip
KINDS = ("matmul", "small matmul", "attention", "selection", "loss", "moving", "pointwise",
         "other ATen")  # fmt: skip


def kind_of(name: str, shapes: list[Any], narrow: int) -> str | None:
    """The kind of work of a profiled event, or None: it is not work of its own."""
    if "cpp_fused" in name:
        if "log_softmax" in name:
            return "loss"
        return "moving" if any(word in name for word in MOVING) else "pointwise"
    if any(word in name for word in ATTENTION):
        return "attention"
    if any(word in name for word in SELECTION):
        return "selection"
    if any(word in name for word in MATMULS):
        sizes = [size for shape in shapes for size in shape]
        return "small matmul" if sizes and min(sizes) <= narrow else "matmul"
    return "other ATen" if name.startswith("aten::") else None


def profiled(peer: Peer, batch: dict[str, Any], narrow: int) -> dict[str, float]:
    """Milliseconds of one step by kind. Nested operators count for the innermost one."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        took = peer.step(batch)["step"] * 1e3
    spent = dict.fromkeys(KINDS, 0.0)
    for event in found.events():
        kind = kind_of(event.name, event.input_shapes or [], narrow)
        if kind is not None:
            spent[kind] += event.self_cpu_time_total / 1e3
    return {**spent, "rest": took - sum(spent.values()), "step": took}


def main() -> None:
    """Profile the baseline and ours in turns; print a table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of a step by kind of work, on a CPU.")
    parser.add_argument("--preset", default="cpu-small", choices=list(PRESETS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="of the whole step"
    )
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    names = (BASELINE, OURS, f"{OURS}-trim")
    inductor_config.cpp.enable_kernel_profile = True  # names the kernels that Inductor generates
    built, _ = peers.build(preset)
    batch = preset.batches(1)[0]
    running = [Peer(name, built[name], args.clock, preset.autocast) for name in names]
    for peer in running * 3:
        peer.step(batch)
    narrow = 4 * preset.lora_rank
    turns = [
        {peer.name: profiled(peer, batch, narrow) for peer in running} for _ in range(args.turns)
    ]
    medians = {
        name: {k: round(statistics.median(t[name][k] for t in turns), 2) for k in turns[0][name]}
        for name in names
    }
    print(f"| kind | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for kind in medians[names[0]]:
        print(f"| {kind} | {' | '.join(f'{medians[n][kind]:.1f} ms' for n in names)} |")
    face = {"preset": preset.name, "milliseconds": medians, "turns": args.turns}
    face |= {"machine": measuring.machine(args.clock), "versions": measuring.versions()}
    if args.json:
        args.json.write_text(json.dumps(face, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
