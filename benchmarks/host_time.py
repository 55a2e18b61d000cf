"""Host time of a training call outside compiled code, by who spends it.

Each batch is called twice. In the first call graphs run (with the backend "eager", which compiles
nothing), and what they return is kept; in the second, which is timed, they return it again and
compute nothing, as on a GPU, where the host only launches. What is left of a forward is ours (token
lists, the schedule, reports) and Dynamo's (guards, the call of the graph). The clock is the CPU
time of the thread; a figure is the median of several calls.

    python -m benchmarks.host_time --json benchmarks/results/host_time.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparselora_fx as slx
from benchmarks.compile_time import build
from sparselora_fx.compiler import backend
from sparselora_fx.lowering import inductor_backend

Function = Callable[..., Any]


class Graphs:
    """What graphs return: kept in the order of their calls, and returned in that order again."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.replayed: int | None = None  # calls so far; None: graphs run

    def wrapped(self, graph: Function) -> Function:
        def run(*args: Any) -> Any:
            if self.replayed is None:
                self.kept.append(graph(*args))
                return self.kept[-1]
            self.replayed += 1
            return self.kept[self.replayed - 1]

        return run


class Clock:
    """Milliseconds spent in functions, added up."""

    def __init__(self) -> None:
        self.spent = 0.0

    def timed(self, function: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += 1e3 * (time.thread_time() - start)

        return run


@dataclass(frozen=True)
class Clocks:
    """``whole``: the compiled call; ``rest``: rewritten graphs and what surrounds them; ``graph``:
    what the backend compiled."""

    graph: Clock = field(default_factory=Clock)
    rest: Clock = field(default_factory=Clock)
    whole: Clock = field(default_factory=Clock)

    def reset(self) -> None:
        self.graph.spent = self.rest.spent = self.whole.spent = 0.0

    def split(self, total: float) -> tuple[float, float]:
        """A call of ``total`` milliseconds: ours, and Dynamo's."""
        around = max(self.rest.spent - self.graph.spent, 0.0)  # none around a dense graph
        inside = self.rest.spent or self.graph.spent
        return total - self.whole.spent + around, self.whole.spent - inside


def measure(layers: int, calls: int) -> dict[str, Any]:
    """Dense and sparse calls of a small Llama: median ms of ours and of Dynamo's."""
    torch.set_num_threads(1)
    model = build(layers)
    plan = slx.SparsityPlan({"mlp": 0.75, "self_attn": 0.5}, start_step=1)
    estimator = slx.SVDEstimator.build(model, rank=4, progress=False)
    slx.compile(model, estimator, plan=plan, backend="eager", trim_logits=True)
    graphs, clocks = Graphs(), Clocks()
    model.forward.compiled = clocks.whole.timed(model.forward.compiled)  # type: ignore[union-attr]
    plain = inductor_backend.backend_compile
    called = backend._Rewritten.__call__

    def compiled(*args: Any, **kwargs: Any) -> Function:
        return clocks.graph.timed(graphs.wrapped(plain(*args, **kwargs)))

    inductor_backend.backend_compile = compiled
    backend._Rewritten.__call__ = clocks.rest.timed(called)  # type: ignore[method-assign]
    try:
        return {
            f"{kind}{'_counted' * counted}": _calls(model, step, counted, calls, graphs, clocks)
            for kind, step in (("dense", 0), ("sparse", 1))
            for counted in (False, True)
        }
    finally:
        inductor_backend.backend_compile = plain
        backend._Rewritten.__call__ = called  # type: ignore[method-assign]


def _calls(
    model: nn.Module, step: int, counted: bool, calls: int, graphs: Graphs, clocks: Clocks
) -> dict[str, float]:
    slx.step(model, step, 2)
    found: dict[str, list[float]] = {"ours_ms": [], "dynamo_ms": []}
    for call in range(calls + 2):
        batch = _batch(call)
        if counted:
            slx.count_tokens(model, batch)
        graphs.kept, graphs.replayed = [], None
        model(**batch)
        graphs.replayed = 0
        clocks.reset()
        start = time.thread_time()
        model(**batch)
        total = 1e3 * (time.thread_time() - start)
        if call > 1:  # the first two compile
            ours, dynamo = clocks.split(total)
            found["ours_ms"].append(ours)
            found["dynamo_ms"].append(dynamo)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def _batch(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 128, (4, 64), generator=generator)
    labels = ids.clone()
    labels[:, : 32 + seed % 7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args(argv)
    found = {
        "torch": torch.__version__, "machine": platform.machine(), "layers": options.layers,
        "cases": measure(options.layers, options.calls),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
