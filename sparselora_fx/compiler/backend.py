"""The torch.compile backend: run the passes on each graph, compile it, and keep what it chose
within reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor, fx

from sparselora_fx.compiler.pass_log import PassLog
from sparselora_fx.compiler.patience import Clock
from sparselora_fx.compiler.piecewise import compile_piecewise
from sparselora_fx.compiler.pipeline import run
from sparselora_fx.compiler.report import DENSE, OBSERVED, SPARSE, Compilation, GraphReport
from sparselora_fx.compiler.switches import switched_on
from sparselora_fx.environment import disabled_layers
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.lowering import inductor_backend
from sparselora_fx.passes import ONLINE_CALIBRATION, PIPELINE, WHOLE_GRAPH
from sparselora_fx.rewrite.rewrite import Options, TracedCall


class Listener(Protocol):
    """Who hears of the graphs that a backend compiles: the runtime of a compiled model."""

    calls: int  # how often the model was called

    def graph_traced(self, gm: fx.GraphModule, inputs: Sequence[object]) -> tuple[bool, TracedCall]:
        """A graph was traced. Returns whether labels are shifted, and what is known of the model's
        call; raises `BeginsAnew` if that call must begin anew."""

    def graph_rewritten(self, report: GraphReport | None, inputs: Sequence[object]) -> int:
        """A graph is about to be compiled: what the passes did to it; None for one that is left as
        it was. Returns its number, from 1; raises `BeginsAnew` if the model's call must begin
        anew, dense."""

    def pass_log(self) -> PassLog:
        """What follows a graph through the passes."""

    def graph_compiled(self, compilation: Compilation) -> None:
        """A graph was compiled."""

    def replayable(
        self,
        compiled: Callable[..., object],
        gm: fx.GraphModule,
        inputs: Sequence[object],
        extra: int,
    ) -> Callable[..., object]:
        """What to run in place of a compiled graph: the same, or CUDA graphs of it. ``extra``: so
        many outputs beyond the model's own."""

    def graph_ran(
        self, report: GraphReport, args: tuple[object, ...], extra: Sequence[Tensor], *, first: bool
    ) -> None:
        """A rewritten graph has run: with its inputs, and its outputs beyond the model's own.
        ``first``: in the first call of the model that used these weights, as one graph serves many
        layers; as often as it runs there, for a block may be applied twice."""


def make_backend(
    listener: Listener, name: str, options: Options, blocks: Iterable[str]
) -> Callable[..., object]:
    """A backend for ``torch.compile``. Graphs without a marked site go to the named backend
    untouched. ``blocks``: the names of the model's repeated blocks, between which graphs may be
    cut."""
    repeated = tuple(blocks)
    clock = Clock()

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        report, compilation, inputs = rewrite_graph(listener, gm, inputs, options)
        rewritten = compilation.kind == SPARSE
        compile_graph = partial(inductor_backend.backend_compile, name, rewritten=rewritten)
        with clock.timing(compilation):
            if rewritten and "pieces" not in disabled_layers():
                compiled = compile_piecewise(gm, inputs, repeated, compile_graph)
            else:
                compiled = compile_graph(gm, inputs)
        listener.graph_compiled(compilation)
        compiled = listener.replayable(compiled, gm, inputs, report.extra if report else 0)
        return compiled if report is None else _Rewritten(compiled, report, listener)

    return backend


def rewrite_graph(
    listener: Listener, gm: fx.GraphModule, inputs: Sequence[object], options: Options
) -> tuple[GraphReport | None, Compilation, Sequence[object]]:
    """Run the passes over a traced graph, in place. Returns what they did (None: it has no marked
    site), what the graph is, and those of the inputs that it still has."""
    shift, call = listener.graph_traced(gm, inputs)
    # A graph that is observed is otherwise left as it is, and compiled as it would be.
    observed = _is_observed(gm)
    passes = switched_on(ONLINE_CALIBRATION if observed else PIPELINE)
    now, log = replace(options, shift=shift), listener.pass_log()
    report = run(gm, inputs, now, passes, switched_on(WHOLE_GRAPH), call, log)
    rewritten = report is not None and not observed
    if report is not None:
        inputs = report.passed(inputs)
    number = listener.graph_rewritten(report if rewritten else None, inputs)
    kind = SPARSE if rewritten else OBSERVED if observed else DENSE
    return report, Compilation(number, kind, _batch(call), _size(gm), log), inputs


def _batch(call: TracedCall) -> str:
    """The sizes of the tokens of a call."""
    grids = [v.shape[:2] for v in call.arguments.values() if v.dim() >= 2]
    return " x ".join(map(str, grids[0])) if grids else ""


def _size(gm: fx.GraphModule) -> int:
    """How many calls a graph has, its bodies' included."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return sum(node.op.startswith("call") for graph in graphs for node in graph.nodes)


def _is_observed(gm: fx.GraphModule) -> bool:
    """Whether a graph or a body of it has a marker that asks for rows to calibrate on."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(op_name(node) == "observed" for graph in graphs for node in graph.nodes)


class _Rewritten:
    """A compiled graph whose extra outputs (selections and rows) are taken off before its caller
    sees them."""

    def __init__(
        self, compiled: Callable[..., object], report: GraphReport, listener: Listener
    ) -> None:
        self.compiled = compiled
        self.report = report
        self.listener = listener
        self.served: dict[int, int] = {}  # layer -> in which call of the model first
        sites = [site for region in report.regions for site in region.sites] + report.dense
        self.key = sites[0].weight if sites else None

    def __call__(self, *args: object) -> object:
        args = self.report.passed(args)
        outputs = self.compiled(*args)
        assert isinstance(outputs, tuple | list)
        own = len(outputs) - self.report.extra
        # One graph serves many layers: they differ in the weights they pass.
        now, first = self.listener.calls, False
        if self.key is not None:
            first = self.served.setdefault(id(args[self.key]), now) == now
        self.listener.graph_ran(self.report, args, outputs[own:], first=first)
        return outputs[:own]
