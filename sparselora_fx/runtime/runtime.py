"""What one compiled model carries: what is on its modules, what calls are for, what graphs say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from sparselora_fx._torch import in_backward
from sparselora_fx.analysis.losses import shown_conventions
from sparselora_fx.compiler.cuda_graphs import CudaGraphs
from sparselora_fx.compiler.pass_log import PassHook, PassLog
from sparselora_fx.compiler.recompiles import Recompiles
from sparselora_fx.compiler.report import Compilation, GraphReport
from sparselora_fx.errors import CompileError
from sparselora_fx.estimator.online import Collector
from sparselora_fx.model.attributes import RUNTIME
from sparselora_fx.model.conventions import Convention
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.notices import Notices
from sparselora_fx.plan.plan import Sparsity, SparsityPlan
from sparselora_fx.plan.schedule import refreshes, sparsity_scale_at
from sparselora_fx.rewrite.rewrite import Options, TracedCall
from sparselora_fx.runtime.attachment import Attachment
from sparselora_fx.runtime.calls import AroundStep, BeginsAnew, Call
from sparselora_fx.runtime.copies import OWNER
from sparselora_fx.runtime.counting import Comparison
from sparselora_fx.runtime.failing_safe import Safety
from sparselora_fx.runtime.giving_up import slices_nothing
from sparselora_fx.runtime.hooks import TraceInputs
from sparselora_fx.runtime.named_tokens import KeptLabels
from sparselora_fx.runtime.outcomes import SiteOutcome, note_outcomes
from sparselora_fx.runtime.speed_check import SpeedCheck
from sparselora_fx.runtime.tally import TokenTally
from sparselora_fx.runtime.traced_call import traced_call
from sparselora_fx.watch.state import WatchState


@dataclass
class Runtime:
    """Everything `restore` must undo, and everything `explain` and `record` read."""

    model: nn.Module
    plan: SparsityPlan
    sparsity: dict[str, Sparsity]
    frozen: list[FrozenWeight]
    convention: Convention = field(default_factory=lambda: Convention(True))
    collector: Collector | None = None  # of a plan that calibrates online
    cuda_graphs: CudaGraphs | None = None
    verify_speed: bool | None = False  # None: where training has a dense phase
    trace_inputs: TraceInputs = field(default_factory=TraceInputs)
    kept_labels: KeptLabels | None = None  # of the present batch, which the model does not get
    tally: TokenTally = field(default_factory=TokenTally)
    active: bool = True
    every_token: bool = False  # is sparse: one token grid would have to serve two stacks
    padded: bool = False  # a sparse step has had padding
    call: Call = field(default_factory=Call)  # what calls are for, now
    warm_up_next: bool = False  # compile the levels to come before the next training call
    blocks: dict[str, nn.Module] = field(default_factory=dict)  # those compiled one by one
    seen: dict[str, SiteOutcome] = field(default_factory=dict)
    recorders: list[Any] = field(default_factory=list)  # those of the open `record` blocks
    recompiles: Recompiles = field(default_factory=Recompiles)
    compilations: list[Compilation] = field(default_factory=list)
    after_pass: PassHook | None = None  # the user's, after each pass of each compilation
    options: Options = field(default_factory=Options)  # of the rewrite, to trace it again
    calls: int = 0  # compiled calls of the model
    dense_calls: set[str] = field(default_factory=set)  # why training calls were dense as a whole
    step: tuple[int, int | None] | None = None  # (step, total), once something drives the schedule
    # What the sites' specs say: the sparsity scale, and whether they are observed.
    specs_set: tuple[float, bool] | None = None
    notices: Notices = field(default_factory=Notices)
    stepped: bool = False  # a sparse training call has run to its end
    anew: bool = False  # the call under way must begin anew (`begin_anew`)
    given_up: bool = False  # nothing can be sliced: training is dense (`giving_up`)
    safety: Safety = field(default_factory=Safety)
    around_step: AroundStep | None = None  # who looks at a step's call; None: nobody
    watching: WatchState | None = None
    estimator_seconds: float = 0.0  # what building the estimator took in this process
    # By frozen linear, the most that it may skip now, whatever the plan says.
    caps: dict[str, Sparsity] = field(default_factory=dict)
    caps_set: Mapping[str, Sparsity] | None = None  # those that the sites' specs obey

    def __post_init__(self) -> None:
        self.names = self._names()
        self.comparison = Comparison(self.notices)
        self.speed = SpeedCheck(self.verify_speed, self._work_done)
        self.attached = Attachment(self, self.model, self.frozen, self.sparsity, self.trace_inputs)

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return self.recompiles.graphs

    @property
    def stays_dense(self) -> bool:
        """Whether the training call under way is dense, whatever the schedule says."""
        short = self.step is not None and self.plan.too_short(self.step[1])
        return short or self.given_up or self.speed.stays_dense or self.safety.dense

    @property
    def sparse_now(self) -> bool:
        """Whether the sites' specs, as they stand, make calls sparse."""
        return self.specs_set is not None and self.specs_set[0] > 0

    def _work_done(self) -> tuple[int, int]:
        """Graphs that were compiled or captured so far, and captures replayed."""
        graphs = self.cuda_graphs
        if graphs is None:
            return self.graphs, 0
        return self.graphs + graphs.captures, graphs.pool.forwards

    def runs_dense_to_compare(self, sparsity_scale: float) -> bool:
        """Whether a call that is to be sparse runs dense, so that speed can be compared: only at
        the schedule's highest level and the plan's last stage, and unasked only where training has
        a dense phase."""
        if not self.call.is_step or sparsity_scale < max(self.sparsity_scales()):
            return False
        if self.watching is not None and self.watching.stages.climbing:
            return False
        if self.speed.wanted is None and (self.step is None or not self.plan.start_step):
            return False
        captures = self.cuda_graphs is not None and self.cuda_graphs.used
        dense = self.speed.runs_dense(self.step[0] if self.step else None, captures=captures)
        self.warn_of_speed()
        return dense or self.speed.stays_dense

    def warn_of_speed(self) -> None:
        """Say, once, if training stays dense because sparse steps are not faster."""
        if self.speed.verdict is not None and self.speed.stays_dense:
            self.notices.warn(self.speed.verdict.advice())

    def name_of(self, weight: object) -> str | None:
        """The module name of a frozen weight that a graph was called with."""
        found = self.names.get(id(weight))
        if found is None or found.traced is not weight:
            self.names = self._names()  # parameters may have been replaced since
            found = self.names.get(id(weight))
        return None if found is None else found.name

    def _names(self) -> dict[int, FrozenWeight]:
        return {id(w.traced): w for w in self.frozen if w.traced is not None}

    def sparsity_scales(self) -> list[float]:
        """Every sparsity scale that the schedule takes as it is driven now, rising."""
        plan = self.plan
        if self.step is None:
            return [1.0]
        stages = {sparsity_scale for _, sparsity_scale in plan.ramp} or {1.0}
        dense = plan.start_step or plan.end_step is not None or plan.ramp or plan.refresh
        return sorted({*stages, 0.0} if dense else stages)

    def sparsity_scale(self) -> float:
        """The sparsity scale, by which the plan's sparsities are multiplied now: 0 is dense."""
        plan = self.plan
        if self.call.has_level:
            return self.call.level
        if self.step is not None:
            scale = sparsity_scale_at(*self.step, plan.start_step, plan.end_step, plan.ramp)
            return 0.0 if scale and self.refreshes() else scale
        if plan.start_step or plan.end_step is not None or plan.ramp:
            self.notices.warn(
                "nothing drives the plan's schedule, so training is sparse from the first call: "
                "add sparselora_fx.SparsityCallback() to the Trainer, call "
                "sparselora_fx.step(model, n, total) before each step, or pass start_step=0"
            )
        return 1.0

    def refreshes(self) -> bool:
        """Whether the present step is one of those that calibrate again."""
        if self.step is None or self.collector is None:
            return False
        return refreshes(self.step[0], self.plan.refresh)

    def set_sparsity_scale(self, sparsity_scale: float, *, observed: bool = False) -> None:
        """Tell every site how sparse it is: ``sparsity_scale`` times the plan's sparsity. With
        ``observed`` (and a scale of 0) those that the plan makes sparse are told that their input
        is looked at."""
        if (sparsity_scale, observed) == self.specs_set and self.caps is self.caps_set:
            return
        self.set_sparsity(
            {name: s.scaled(sparsity_scale, at_most=self.caps.get(name))
             for name, s in self.sparsity.items()}
        )  # fmt: skip
        if observed:
            self.attached.set_observed()
        self.specs_set, self.caps_set = (sparsity_scale, observed), self.caps

    def cap(self, caps: Mapping[str, Sparsity]) -> None:
        """From the next call on, no frozen linear named here skips more than this share. The specs
        of the call under way stay: its backward may run blocks again."""
        self.caps = dict(caps)

    def set_sparsity(self, sparsity: Mapping[str, Sparsity]) -> None:
        """Tell every site how sparse it is, by `FrozenWeight.name`; those left out are dense."""
        self.specs_set = None
        self.attached.set_sparsity(sparsity)

    def end_online_calibration(self) -> None:
        """Build and place the factors, unless that was done; before the first sparse call."""
        if self.collector is not None and self.collector.estimator is None:
            self.attached.place(self.collector.build(), self.collector.score)

    def collect(
        self, report: GraphReport, args: tuple[object, ...], extra: Sequence[Tensor]
    ) -> None:
        """Count what a graph observed; what a backward computes again was counted before."""
        if self.collector is None or in_backward():
            return
        for seen in report.observed:
            found = [
                (self.name_of(args[i]), kn) for i, kn in zip(seen.weights, seen.kn, strict=True)
            ]
            names = [name for name, _ in found if name is not None]
            self.collector.turn({name: kn for name, kn in found if name is not None})
            taken = None if seen.taken is None else extra[seen.taken]
            self.collector.add(names, extra[seen.rows], taken)

    def begin_anew(self, why: str) -> NoReturn:
        """A graph that is being traced shows that the call under way was prepared wrongly."""
        self.anew = True  # the compiler may wrap what is raised
        raise BeginsAnew(f"the call begins anew: {why}")

    def graph_traced(self, gm: fx.GraphModule, inputs: Sequence[object]) -> tuple[bool, TracedCall]:
        """Learn from a graph how labels are predicted; see `backend.Listener`."""
        convention, traced = self.convention, self.trace_inputs
        if convention.learn(shown_conventions(gm.graph)) and traced.by_labels:
            self.begin_anew("it has the wrong tokens dense")
        call = traced_call(self.model, self.frozen, traced.arguments, inputs)
        return bool(convention.shift), call

    def pass_log(self) -> PassLog:
        """What follows a graph through the passes; see `backend.Listener`."""
        return PassLog(hook=self.after_pass)

    def graph_compiled(self, compilation: Compilation) -> None:
        """Keep what is known of a compiled graph; see `backend.Listener`."""
        self.compilations.append(compilation)

    def graph_rewritten(self, report: GraphReport | None, inputs: Sequence[object]) -> int:
        """Count a graph, unless its call must begin anew; see `backend.Listener`."""
        if report is not None and self.attached.completes(report, inputs, self.name_of):
            self.begin_anew("its graph reads factors that were not placed")
        if report is not None and slices_nothing(self, report, inputs):
            self.begin_anew("nothing of it is sliced")
        self.recompiles.compiling()
        return self.graphs

    def replayable(
        self,
        compiled: Callable[..., object],
        gm: fx.GraphModule,
        inputs: Sequence[object],
        extra: int,
    ) -> Callable[..., object]:
        """The same as CUDA graphs, if wanted; see `backend.Listener`."""
        to = self.cuda_graphs
        return compiled if to is None or to.is_small(gm) else to.wrap(compiled, inputs, extra)

    def graph_ran(
        self, report: GraphReport, args: tuple[object, ...], extra: Sequence[Tensor], *, first: bool
    ) -> None:
        """Hand on what a graph chose and observed; see `backend.Listener`."""
        if first:
            self.observe(report, args)
        if report.observed:
            self.collect(report, args, extra)
        for recorder in self.recorders:
            recorder.add(report, args, extra, self)

    def observe(self, report: GraphReport, args: tuple[object, ...]) -> None:
        """Note what a graph did to the weights it was called with; it may serve many layers."""
        note_outcomes(self.seen, report, args, self.name_of, self.calls)
        for site in (site for region in report.regions for site in region.sites):
            self.trace_inputs.sliced.add(id(args[site.weight]))


def marked_by(frozen: Iterable[FrozenWeight]) -> list[Runtime]:
    """The states of compiled models that hold any of these weights' modules. A module that was
    copied together with its hooks is none of them."""
    found: dict[int, Runtime] = {}
    for module in (weight.module for weight in frozen):
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, OWNER, None)
            if isinstance(owner, Runtime) and any(w.module is module for w in owner.frozen):
                found[id(owner)] = owner
    return list(found.values())


def get_runtime(model: nn.Module) -> Runtime:
    """The state of a compiled model, or a `CompileError` that says how to get one."""
    runtime = getattr(model, "__dict__", {}).get(RUNTIME)
    if not isinstance(runtime, Runtime):
        raise CompileError(
            f"this {type(model).__name__} is not compiled with sparselora_fx; "
            "call model = sparselora_fx.compile(model, estimator) first and pass that same object"
        )
    return runtime
