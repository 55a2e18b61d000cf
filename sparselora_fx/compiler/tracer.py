"""A backend that runs the passes and compiles nothing: what comes back are values of the right
shapes that nobody computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparselora_fx import _torch
from sparselora_fx.analysis.step_work import GraphWork, step_work
from sparselora_fx.compiler.backend import Listener, rewrite_graph
from sparselora_fx.graph.nodes import value
from sparselora_fx.rewrite.rewrite import Options


@dataclass(frozen=True)
class TracedWork:
    """The work of a step, as it was traced and as the passes left it; None: an op of it cannot run
    without values."""

    dense: GraphWork | None = field(default_factory=GraphWork)
    sparse: GraphWork | None = field(default_factory=GraphWork)

    def __add__(self, other: TracedWork) -> TracedWork:
        return TracedWork(_sum(self.dense, other.dense), _sum(self.sparse, other.sparse))


def _sum(one: GraphWork | None, other: GraphWork | None) -> GraphWork | None:
    return None if one is None or other is None else one + other


class TraceListener(Listener, Protocol):
    """Who hears of graphs that are traced, and not compiled."""

    def stand_in_ran(self, work: TracedWork) -> None:
        """A traced graph was called; it would have cost so much."""


def make_tracer(listener: TraceListener, options: Options) -> Callable[..., object]:
    """A backend for ``torch.compile`` whose graphs are traced and rewritten, but never run.

    Floating-point results are NaN, so that nobody takes them for something computed; they need
    gradients where the real ones do.
    """

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        results = pytree.tree_map(value, gm.graph.output_node().args[0])
        dense = step_work(gm, inputs)
        report, compilation, left = rewrite_graph(listener, gm, inputs, options)
        sparse = dense if report is None else step_work(gm, left)
        work = TracedWork(dense, sparse)
        listener.graph_compiled(compilation)

        def stub(*args: object) -> object:
            listener.stand_in_ran(work)
            if report is not None:
                listener.graph_ran(report, report.passed(args), (), first=True)
            return pytree.tree_map(_made_up, results)

        return stub

    return backend


def _made_up(held: object) -> object:
    if isinstance(held, torch.SymInt):
        return _torch.traced_size(held)
    if not isinstance(held, Tensor):
        return held
    sizes = [_torch.traced_size(n) if isinstance(n, torch.SymInt) else n for n in held.shape]
    floating = held.is_floating_point()
    made = torch.full(sizes, float("nan") if floating else 0, dtype=held.dtype, device=held.device)
    # No leaf: code between two graphs may write into it.
    return made.requires_grad_().clone() if held.requires_grad else made
