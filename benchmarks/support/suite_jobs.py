"""The processes that `benchmarks.gpu_suite` runs: what they are called with, need and have
said."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.support.suite_presets import matmul_parameters, preset_of

BASELINE = "peft+compile"
# What the first presets compare; the others, for want of time and memory, have the short lists.
FULL = ("8b-math10k", "1b-default")
OPTIONS = ("ours", "ours+trim", "ours+cudagraphs", "ours+trim+cudagraphs")
BASELINES = ("peft+compile+cudagraphs", "fp8+compile", "liger")
SHORT = ("ours", "ours+trim")
TESTS = "tests marked gpu"
CORRECTNESS = "correctness"
GPU_TESTS = (
    "tests/lowering/test_lowering_gpu.py",
    "-k", "(picked or fallback) and bfloat16 and (48 or attention)",
)  # fmt: skip
EXAMINING = 12.0  # seconds that profile, memory and gradients of a preset take, about
LEAST_TIMED = 4.0  # seconds of turns for a preset


@dataclass
class Job:
    """A process of the suite. ``state``: waiting, compiling, ready, timing, done or failed."""

    name: str
    command: list[str]
    need: float = 0.0  # GiB of device memory, about
    state: str = "waiting"
    found: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def checks(self) -> bool:
        """Whether it checks, and times nothing."""
        return self.name in (CORRECTNESS, TESTS)

    @property
    def alive(self) -> bool:
        """Whether it has begun and not ended."""
        return self.state in ("compiling", "ready", "timing")


def compile_until(start: float, end: float, presets: int) -> float:
    """When compiling has to end: three fifths of the time, or earlier if there are many presets."""
    timing = presets * (EXAMINING + LEAST_TIMED)
    return max(start + 0.25 * (end - start), min(start + 0.6 * (end - start), end - timing))


def memory_need(name: str, peers: Sequence[str], layers: int | None) -> float:
    """GiB that a preset's process takes, about: the CUDA context, two sets of weights in bf16, and
    activations and logits of one step, once more for each peer whose graphs hold their own."""
    preset = preset_of(name, layers)
    samples, length, _ = preset.batch
    shape, tokens = preset.shape, samples * length
    hidden, wide = int(shape["hidden_size"]), int(shape["intermediate_size"])
    weights = 2 * 2 * (matmul_parameters(preset) + hidden * int(shape["vocab_size"]))
    layer = 2 * tokens * (8 * hidden + 3 * wide)
    step = int(shape["num_hidden_layers"]) * layer + 8 * tokens * int(shape["vocab_size"])
    graphs = sum("cudagraphs" in peer for peer in peers)
    return 1.5 + (weights + (1 + graphs) * step) / 2**30


def peers_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """The baseline, ours, and other baselines: what the time does not allow falls off the end."""
    ours, others = (OPTIONS, BASELINES) if name in FULL else (SHORT, ())
    ours = ours if arguments.options is None else arguments.options
    others = others if arguments.baselines is None else arguments.baselines
    return [BASELINE, *ours, *others]


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The processes that a command line asks for, checks first."""
    case, tiny = [sys.executable, "-m", "benchmarks.support.suite_case"], arguments.tiny
    common = ["--backend", arguments.backend or ("aot_eager" if tiny else "inductor")]
    common += ["--tiny"] if tiny else []
    jobs = [Job(CORRECTNESS, [*case, CORRECTNESS, *common], 0 if tiny else 12.0)]
    if torch.cuda.is_available() and not tiny:
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *GPU_TESTS]
        jobs.append(Job(TESTS, pytest, 2.0))
    count = len(arguments.presets)
    end = time.time() + 60 * arguments.minutes
    until = compile_until(time.time(), end, count)
    share = (end - until) / max(1, count) - EXAMINING
    common += ["--compile-until", str(until)]
    common += ["--seconds", str(max(LEAST_TIMED, min(share, 20.0)))]
    common += ["--layers", str(arguments.layers)] if arguments.layers else []
    for name in arguments.presets:
        peers = peers_of(name, arguments)
        need = 0 if tiny else memory_need(name, peers, arguments.layers)
        jobs.append(Job(name, [*case, name, *common, "--peers", *peers], need))
    return jobs
