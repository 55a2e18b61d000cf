"""Time one training step of sparse LoRA against what a user would run instead.

    python -m benchmarks.step_time --preset cpu-small --json F [--details F] [--pairs N]
    [--task T]

Every peer trains the same LoRA on the same frozen weights, batches and optimizer:

- ``peft``: PEFT, eager.
- ``peft+compile``: PEFT under `torch.compile`; the baseline.
- ``liger``: PEFT with Liger's kernels, eager; where a GPU is and it is installed.
- ``reference``: the reference algorithm as swapped eager modules (`benchmarks.support.reference`).
- ``reference-cut``: the same with that implementation's cut gradients.
- ``sparselora_fx``: this package, and ``sparselora_fx-trim`` with ``trim_logits=True``.

Peers take turns, A B C A B C, so that a busy machine disturbs all of them alike. A ratio is the
median over turns of (baseline's time / peer's time): above 1 is faster than the baseline. Random
weights: time depends on shapes alone. `benchmarks.support.stepping` says how a step is run and
timed: on a GPU under autocast, and without waiting inside it. Peak memory is that of one step, all
weights of the peer included. ``flop_ratio`` is dense over sparse FLOPs, counted as
`benchmarks.flops` does, and ``realised`` is ``ratio / flop_ratio``. ``estimator_share`` is
the time of the nodes that choose channels, compiled by themselves, over the time of the sparse
step.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import DENSE, Counter
from benchmarks.support import measuring, peers
from benchmarks.support.presets import PRESETS, Preset
from benchmarks.support.stepping import PHASES, Peer, ratio, take_turns

BASELINE = "peft+compile"
OURS = "sparselora_fx"
FACE = (
    "preset", "baseline", "ratio", "flop_ratio", "realised", "peers", "peak_memory_ratio",
    "estimator_share", "pairs", "machine", "versions",
)  # fmt: skip


def flop_ratio(preset: Preset, *, trim: bool = False) -> float:
    """Dense over sparse FLOPs of the preset."""
    counter = Counter(preset.shape, preset.batch, lora=preset.lora_rank)
    levels = preset.levels()
    ours = counter.depth(levels).total - (counter.trimmed(levels).total if trim else 0)
    return counter.depth([DENSE] * len(levels)).total / ours


def run(
    preset: Preset, pairs: int, minutes: float, clock: str = "wall", backend: str = "inductor"
) -> dict[str, Any]:
    """Measure a preset. Returns the fixed face and the details."""
    batches = preset.batches()
    built, missing = peers.build(preset, backend)
    running = [Peer(name, model, clock, preset.autocast) for name, model in built.items()]
    for peer in running:
        for batch in batches[:2]:
            peer.step(batch)
        print(f"{peer.name}: warm, {peer.step(batches[0])['step'] * 1e3:.1f} ms", flush=True)
    turns = take_turns(running, batches, pairs, 60 * minutes)
    known = {peer.name: peer for peer in running}
    memory = {
        p.name: measuring.peak_memory(p.model, lambda p=p: p.step(batches[0])) for p in running
    }
    estimator = measuring.estimator_seconds(preset, clock) / known[OURS].median("step")
    expected = flop_ratio(preset)
    found = ratio(known[OURS], known[BASELINE])
    ratios: dict[str, Any] = {p.name: round(ratio(p, known[BASELINE]), 3) for p in running}
    face = {
        "preset": preset.name,
        "baseline": BASELINE,
        "ratio": round(found, 4),
        "flop_ratio": round(expected, 4),
        "realised": round(found / expected, 4),
        "peers": ratios | dict.fromkeys(missing),
        "peak_memory_ratio": round(memory[OURS] / memory[BASELINE], 4),
        "estimator_share": round(estimator, 5),
        "pairs": turns,
        "machine": measuring.machine(clock),
        "versions": measuring.versions(),
    }
    return {"face": face, "peers": describe(running, memory, preset, known[BASELINE])}


def describe(
    running: list[Peer], memory: dict[str, int], preset: Preset, baseline: Peer
) -> dict[str, dict[str, float]]:
    """Per peer: median milliseconds of each phase, tokens a second, peak memory in MiB, ratio."""
    samples, length, _ = preset.batch
    found = {}
    for peer in running:
        times = {f"{phase}_ms": round(peer.median(phase) * 1e3, 2) for phase in (*PHASES, "step")}
        found[peer.name] = {
            **times,
            "tokens_per_second": round(samples * length / peer.median("step"), 1),
            "peak_memory_mib": round(memory[peer.name] / 2**20, 1),
            "ratio": round(ratio(peer, baseline), 3),
        }
    return found


def table(details: dict[str, dict[str, float]], missing: dict[str, str]) -> str:
    """The peers as Markdown."""
    columns = list(next(iter(details.values())))
    lines = [f"| peer | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {n} | {' | '.join(str(v) for v in d.values())} |" for n, d in details.items()]
    return "\n".join(lines + [f"\n{name}: not measured, {why}" for name, why in missing.items()])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time a sparse training step against its peers.")
    parser.add_argument("--preset", required=True, choices=list(PRESETS))
    parser.add_argument("--task", help="Math10K, CSR, Code or MT-Bench, for the 8B and 13B presets")
    parser.add_argument("--json", type=Path, help="the fixed face")
    parser.add_argument("--details", type=Path, help="the split by phase, memory, tokens/s")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=3.0, help="for the timed turns")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: processor time, for a machine that others use too; set OMP_NUM_THREADS=1",
    )  # fmt: skip
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    preset = PRESETS[args.preset].for_task(args.task)
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{preset.name} needs an NVIDIA GPU; there is none here: not measured")
    torch.manual_seed(0)
    gc.collect()
    found = run(preset, args.pairs, args.minutes, args.clock, args.backend)
    print(table(found["peers"], peers.missing(preset)))
    print(json.dumps(found["face"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(found["face"], indent=1) + "\n", encoding="utf-8")
    if args.details:
        args.details.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
