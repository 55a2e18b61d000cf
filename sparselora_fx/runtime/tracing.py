"""Trace a compiled model on a batch without running it: what its passes would do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sparselora_fx import _torch
from sparselora_fx.compiler.pass_log import PassHook, PassLog
from sparselora_fx.compiler.recompiles import Recompiles
from sparselora_fx.compiler.report import Compilation, GraphReport
from sparselora_fx.compiler.tracer import TracedWork, make_tracer
from sparselora_fx.errors import CompileError
from sparselora_fx.model.attributes import spec_name
from sparselora_fx.model.preserve import kept_buffers, kept_modes, kept_random_numbers
from sparselora_fx.rewrite.rewrite import TracedCall
from sparselora_fx.runtime.calls import Call, CallKind
from sparselora_fx.runtime.copies import stand_in_behind, stand_in_of
from sparselora_fx.runtime.forward import CompiledForward
from sparselora_fx.runtime.outcomes import SiteOutcome, note_outcomes
from sparselora_fx.runtime.regional import CompiledBlock
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.tally import TokenTally


@dataclass
class Traced:
    """What tracing one batch showed; listens to the graphs as `backend.Listener` says.

    Attributes:
        batch: what was traced.
        seen: by frozen weight, what would become of it.
        compilations: the graphs, in the order in which they were traced.
        tally: the batch's tokens.
        work: of the step, as far as it is in graphs.
    """

    runtime: Runtime
    batch: Mapping[str, object]
    texts: bool = False
    hook: PassHook | None = None
    seen: dict[str, SiteOutcome] = field(default_factory=dict)
    compilations: list[Compilation] = field(default_factory=list)
    tally: TokenTally = field(default_factory=TokenTally)
    work: TracedWork = field(default_factory=TracedWork)
    calls: int = 0

    def stand_in_ran(self, work: TracedWork) -> None:
        self.work += work

    def graph_traced(self, gm: fx.GraphModule, inputs: Sequence[object]) -> tuple[bool, TracedCall]:
        return self.runtime.graph_traced(gm, inputs)

    def pass_log(self) -> PassLog:
        return PassLog(self.texts, self.hook)

    def graph_rewritten(self, report: GraphReport | None, inputs: Sequence[object]) -> int:
        runtime = self.runtime
        if report is not None and runtime.attached.completes(report, inputs, runtime.name_of):
            runtime.begin_anew("its graph reads factors that were not placed")
        return len(self.compilations) + 1

    def graph_compiled(self, compilation: Compilation) -> None:
        self.compilations.append(compilation)

    def replayable(
        self,
        compiled: Callable[..., object],
        gm: fx.GraphModule,
        inputs: Sequence[object],
        extra: int,
    ) -> Callable[..., object]:
        return compiled

    def graph_ran(
        self, report: GraphReport, args: tuple[object, ...], extra: Sequence[Tensor], *, first: bool
    ) -> None:
        note_outcomes(self.seen, report, args, self.runtime.name_of, self.calls)


def trace(
    runtime: Runtime,
    batch: Mapping[str, object],
    *,
    texts: bool = False,
    hook: PassHook | None = None,
) -> Traced:
    """Trace one training call at the schedule's last level.

    The compiled graphs of the model are neither used nor added to, and its state is afterwards what
    it was. What the model does outside of graphs (between graph breaks, around blocks that are
    compiled one by one) is done, on values that mean nothing.

    Args:
        runtime: of a compiled model.
        batch: keyword arguments of the model, as in training.
        texts: keep the text of each graph before and after each pass.
        hook: called after each pass.
    """
    if not isinstance(batch, Mapping):
        raise CompileError(
            f"a batch is a mapping of the model's keyword arguments, got a {type(batch).__name__}"
        )
    traced = Traced(runtime, batch, texts, hook)
    # Behind what accelerate wraps around it: an autocast, outputs in fp32.
    forward = stand_in_behind(runtime.model.__dict__.get("forward"))
    if not isinstance(forward, CompiledForward):
        raise CompileError(
            "the model's forward was replaced since it was compiled, so it cannot be traced; call "
            "model = sparselora_fx.compile(model, estimator) again"
        )
    backend = make_tracer(traced, runtime.options)
    model = runtime.model
    ours = {id(module._buffers[name]) for module, name in runtime.attached.buffers}
    with (
        _as_it_was(runtime, traced), _tracing(runtime, forward, backend), kept_modes(model),
        kept_random_numbers(model), kept_buffers(model, ours), torch.enable_grad(),
        _torch.sizes_forgotten(),
    ):  # fmt: skip
        model.train()
        model.forward(**batch)
    return traced


@contextlib.contextmanager
def _tracing(
    runtime: Runtime, forward: CompiledForward, backend: Callable[..., object]
) -> Iterator[None]:
    """The model's compiled functions are traced ones meanwhile."""
    held: list[CompiledForward | CompiledBlock] = [forward]
    if runtime.blocks:
        stand_ins = (stand_in_of(block, "forward") for block in runtime.blocks.values())
        held = [found for found in stand_ins if isinstance(found, CompiledBlock)]
    compiled = [one.compiled for one in held]
    try:
        for one in held:
            one.compiled = _torch.compile_callable(one.original, backend, None)
        yield
    finally:
        for one, before in zip(held, compiled, strict=True):
            one.compiled = before


@contextlib.contextmanager
def _as_it_was(runtime: Runtime, traced: Traced) -> Iterator[None]:
    """What a call writes down goes into ``traced``, or is forgotten."""
    names = (
        "tally", "recompiles", "calls", "stepped", "padded", "warm_up_next", "given_up", "call",
        "recorders", "specs_set", "caps_set",
    )  # fmt: skip
    kept = {name: getattr(runtime, name) for name in names}
    measured, runtime.speed.verdict = runtime.speed.verdict, None  # it may keep training dense
    named = [(weight.module.__dict__, spec_name(weight.param)) for weight in runtime.frozen]
    specs = [(held, name, held[name]) for held, name in named if name in held]
    sliced, dense_calls = set(runtime.trace_inputs.sliced), set(runtime.dense_calls)
    try:
        runtime.tally = TokenTally(notices=runtime.tally.notices)  # nobody is told twice
        runtime.recompiles, runtime.recorders = Recompiles(), []
        runtime.call = Call(CallKind.TRACE, level=max(runtime.sparsity_scales()))
        runtime.warm_up_next = runtime.given_up = False
        yield
    finally:
        traced.tally, runtime.speed.verdict = runtime.tally, measured
        for name, value in kept.items():
            setattr(runtime, name, value)
        for held, name in named:
            held.pop(name, None)
        for held, name, spec in specs:
            held[name] = spec
        runtime.trace_inputs.sliced, runtime.dense_calls = sliced, dense_calls
