"""One preset of `benchmarks.gpu_suite`, in a process of its own.

It compiles its peers, says ``ready`` and waits for a line on its standard input: the device is then
its own. Whatever it finds out is a line of JSON on its standard output that begins with `MARK`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.support import measuring, suite_correctness
from benchmarks.support.peers import Family, why_not
from benchmarks.support.presets import Preset
from benchmarks.support.stepping import STEPS_OF_A_TURN, Peer, ratio, take_turns
from benchmarks.support.suite_presets import flop_share, matmul_parameters, preset_of

MARK = "@suite "
WARM_STEPS = 3
TURNS_OF_A_ROUND = 4
NO_TIME = "no time was left to compile it"


def say(kind: str, **found: Any) -> None:
    """Tell the suite."""
    print(MARK + json.dumps({"kind": kind, **found}), flush=True)


def warmed(
    preset: Preset, names: Sequence[str], backend: str, until: float
) -> tuple[list[Peer], dict[str, dict[str, Any]]]:
    """The peers that could be compiled before a time (of `time.time`), and a row for every name."""
    family, batches = Family(preset, backend), preset.batches()
    running: list[Peer] = []
    rows: dict[str, dict[str, Any]] = {}
    longest = 0.0
    for name in names:
        reason = why_not(name, preset.device)
        if reason is None and running and time.time() + longest > until:
            reason = NO_TIME
        if reason is None:
            start = time.time()
            try:
                peer = Peer(name, family.make(name), autocast=preset.autocast)
                for _ in range(WARM_STEPS):
                    peer.turn(batches[:1])
            except Exception as error:  # a peer that fails is a row that says so; others go on
                reason = f"{type(error).__name__}: {str(error)[:300]}"
            else:
                running.append(peer)
                longest = max(longest, time.time() - start)
                rows[name] = {"peer": name, "compile_s": round(time.time() - start, 1)}
        if reason is not None:
            rows[name] = {"peer": name, "not_measured": reason}
        say("peer", **rows[name])
    return running, rows


def timed(running: Sequence[Peer], rows: dict[str, dict[str, Any]], preset: Preset) -> None:
    """Fill in what the turns so far say."""
    samples, length, _ = preset.batch
    for peer in running:
        step = peer.median("step")
        rows[peer.name] |= {
            "wall_ms": round(step * 1e3, 3),
            "ratio": round(ratio(peer, running[0]), 4),
            "host_ms": [round(peer.median(p) * 1e3, 2) for p in ("forward", "backward")],
            "tokens_per_s": round(samples * length / step),
            "tflops_4n": round(4 * matmul_parameters(preset) * samples * length / step / 1e12, 2),
            "turns": len(peer.times),
        }


def examined(peer: Peer, row: dict[str, Any], preset: Preset) -> None:
    """Fill in what is measured apart from the times: device work, memory, loss and gradients."""
    batches = preset.batches()
    if preset.device == "cuda":
        steps = STEPS_OF_A_TURN["cuda"]
        row |= measuring.device_work(lambda: peer.turn(batches[:steps]), steps)
        row["busy_share"] = round(row["busy_ms"] / row["wall_ms"], 3)
    peak = measuring.peak_memory(peer.model, lambda: peer.turn(batches[:1]))
    loss, norm = peer.gradient_norm(batches[0])
    row |= {"peak_gib": float(f"{peak / 2**30:.4g}"), "loss": round(loss, 4)}
    row["grad_norm"] = float(f"{norm:.4g}")


def measure(preset: Preset, names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Compile, wait for the device, take turns for so many seconds, examine each peer."""
    running, rows = warmed(preset, names, arguments.backend, arguments.compile_until)
    say("ready", peers=[peer.name for peer in running])
    if not sys.stdin.readline():
        return  # the suite has ended
    end = time.time() + arguments.seconds
    batches = preset.batches()
    while running and time.time() < end:
        take_turns(running, batches, TURNS_OF_A_ROUND, end - time.time())
        timed(running, rows, preset)
        say("rows", rows=list(rows.values()))
    for peer in running:
        examined(peer, rows[peer.name], preset)
        say("rows", rows=list(rows.values()))


def describe(preset: Preset) -> dict[str, Any]:
    """What a row holds for."""
    samples, length, outputs = preset.batch
    return {
        "shape": preset.shape,
        "batch": {"samples": samples, "length": length, "tokens_with_loss": outputs},
        "levels": preset.levels(),
        "dtype": str(preset.dtype), "adapters": "float32", "lora_rank": preset.lora_rank,
        "flop_ratio": round(1 / flop_share(preset), 3),
        "flop_ratio_trimmed": round(1 / flop_share(preset, trim=True), 3),
    }  # fmt: skip


def main() -> None:
    """Run in a process of its own; `benchmarks.gpu_suite` starts it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a preset of the suite, or 'correctness'")
    parser.add_argument("--peers", nargs="+", default=["peft+compile", "ours"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--compile-until", type=float, default=float("inf"), help="time.time()")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the turns")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # all peers share the code of one forward
    torch.manual_seed(0)
    if arguments.name == "correctness":
        for found in suite_correctness.checks(arguments.tiny, arguments.backend):
            say("check", **found)
    else:
        preset = preset_of(arguments.name, arguments.layers, tiny=arguments.tiny)
        say("preset", **describe(preset))
        measure(preset, arguments.peers, arguments)
    say("done")


if __name__ == "__main__":
    main()
