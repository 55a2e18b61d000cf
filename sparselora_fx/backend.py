"""The torch.compile backend: run the passes on each graph, compile it, and keep what it chose
within reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from sparselora_fx import _torch
from sparselora_fx.conventions import OtherConvention
from sparselora_fx.frozen import block_names
from sparselora_fx.labels import shown_conventions
from sparselora_fx.passes import DENSE_PHASE, PIPELINE
from sparselora_fx.pieces import compile_in_pieces
from sparselora_fx.pipeline import GraphReport, run
from sparselora_fx.regions import Options
from sparselora_fx.state import State


def make_backend(state: State, name: str, options: Options) -> Callable[..., Any]:
    """A backend for ``torch.compile``. Graphs without a marked site go to the named backend
    untouched."""

    repeated = block_names(state.frozen).values()
    own = {id(weight.weight) for weight in state.frozen}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        convention = state.convention
        if convention.learn(shown_conventions(gm.graph)) and state.phase.tokens:
            convention.retry = True
            raise OtherConvention("the call begins anew, with the tokens dense that carry loss")
        state.recompiles.compiling()
        # A graph that is observed is otherwise left as it is, and compiled as it would be.
        observed = bool(state.phase.picked)
        now = replace(options, shift=bool(convention.shift))
        frozen = frozenset(i for i, value in enumerate(inputs) if id(value) in own)
        passes = DENSE_PHASE if observed else PIPELINE
        report = run(gm, inputs, now, passes, state.phase.arguments, frozen)
        rewritten = report is not None and not observed
        compile_graph = partial(_torch.backend_compile, name, rewritten=rewritten)
        if rewritten:
            compiled = compile_in_pieces(gm, inputs, repeated, compile_graph)
        else:
            compiled = compile_graph(gm, inputs)
        if state.cuda_graphs is not None:
            compiled = state.cuda_graphs.wrap(compiled, inputs, report.extra if report else 0)
        return compiled if report is None else _Rewritten(compiled, report, state)

    return backend


class _Rewritten:
    """A compiled graph whose extra outputs (selections and rows) are taken off before its caller
    sees them."""

    def __init__(self, compiled: Callable[..., Any], report: GraphReport, state: State) -> None:
        self.compiled = compiled
        self.report = report
        self.state = state
        self.observed: dict[int, int] = {}  # who it was called for -> in which call first
        sites = [site for region in report.regions for site in region.sites] + report.dense
        self.key = sites[0].weight if sites else None

    def __call__(self, *args: Any) -> Any:
        outputs = self.compiled(*args)
        if self.key is not None:
            who = id(
                args[self.key]
            )  # one graph serves many layers: they differ in the weights they pass
            # Once each; in that first call as often as it runs, for a block may be applied twice.
            if self.observed.setdefault(who, self.state.calls) == self.state.calls:
                self.state.observe(self.report, args)
        own = len(outputs) - self.report.extra
        if self.report.observed:
            self.state.collect(self.report, args, outputs[own:])
        for recorder in self.state.recorders:
            recorder.add(self.report, args, outputs[own:], self.state)
        return outputs[:own]
