"""Clocks, memory, work on a device, and machine: what `benchmarks.support.stepping` measures
with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.graphs import Counted, batch_of, capture, llama
from benchmarks.support.presets import Preset
from benchmarks.support.published import RANK, plan_of


def tick(clock: str = "wall") -> float:
    """Seconds, without waiting for the device.

    ``clock="cpu"``: the processor time of this process, all threads, which a busy machine disturbs
    less than the time on the wall. With one thread both agree on an idle machine.
    """
    return time.process_time() if clock == "cpu" else time.perf_counter()


def now(clock: str = "wall") -> float:
    """Seconds, once the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tick(clock)


def device_work(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """What a GPU does in ``run``, which takes ``steps`` steps: milliseconds a step in which some
    kernel runs (``busy_ms``), launches a step (kernels, copies and fills), and the dozen kernels
    that take most, as ``[name, launches a step, ms a step]``."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        now()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
    ]
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]
    counts: Counter[str] = Counter(event.name() for event in events)
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name()] += event.duration_ns()
    top = [
        [n[:120], counts[n] / steps, round(t / steps / 1e6, 3)] for n, t in spent.most_common(12)
    ]
    busy = covered(spans) / steps / 1e6
    return {"busy_ms": round(busy, 3), "launches": round(len(events) / steps), "top": top}


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of some spans."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def peak_memory(model: nn.Module, step: Callable[[], Any]) -> int:
    """Peak bytes of one step, this model's weights included, other models' not."""
    if torch.cuda.is_available():
        now()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        now()
        return weight_bytes(model) + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return weight_bytes(model) + peak


def estimator_seconds(preset: Preset, clock: str, repeats: int = 20) -> float:
    """Time that one step's channel choices take, compiled by themselves: the sum over layers.

    The nodes that serve nothing but a choice are cut out of the rewritten forward of one layer of
    each level, and run on random inputs of their sizes.
    """
    total = 0.0
    levels = preset.levels()
    for level in set(levels):
        if level == (0.0, 0.0):
            continue
        model = llama(preset.shape, 2)
        plan = plan_of([(0.0, 0.0), level], "context")
        forwards, _ = capture(model, batch_of(*preset.batch), plan, rank=RANK)
        part, inputs = _cut_out(forwards[0], preset)
        compiled = torch.compile(part)
        with torch.no_grad():
            for _ in range(3):
                compiled(*inputs)
            times = []
            for _ in range(repeats):
                start = now(clock)
                compiled(*inputs)
                times.append(now(clock) - start)
        total += statistics.median(times) * levels.count(level)
    return total


def _cut_out(graph: Counted, preset: Preset) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The nodes that choose channels as a module, and inputs for it."""
    chosen = graph.serving()
    cut, copies, inputs = fx.Graph(), {}, []
    for node in graph.module.graph.nodes:
        if node not in chosen:
            continue
        for source in node.all_input_nodes:
            if source not in copies:
                copies[source] = cut.placeholder(source.name)
                inputs.append(_random(source.meta["val"], preset))
        copies[node] = cut.node_copy(node, lambda n: copies[n])
        if "device" in node.kwargs:
            copies[node].kwargs = {**node.kwargs, "device": torch.device(preset.device)}
    cut.output([c for n, c in copies.items() if n in chosen and not c.users])
    return fx.GraphModule(torch.nn.Module(), cut), inputs


def _random(like: torch.Tensor, preset: Preset) -> torch.Tensor:
    shape, device = tuple(like.shape), preset.device
    if like.dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.75
    if not like.dtype.is_floating_point:
        return torch.zeros(shape, dtype=like.dtype, device=device)
    return torch.randn(shape, device=device).to(preset.dtype)


def machine(clock: str) -> dict[str, Any]:
    """What the figures hold for, and how busy it was."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    except OSError:
        pass  # not Linux: the platform's own word has to do
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
        "clock": clock,
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions that the figures hold for."""
    import peft
    import transformers

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    return {
        "torch": torch.__version__, "triton": triton or "not installed",
        "transformers": transformers.__version__, "peft": peft.__version__,
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip
