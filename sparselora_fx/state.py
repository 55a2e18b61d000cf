"""What one compiled model carries: its marks on modules, its phase, and what its graphs
reported."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_fx._torch import in_backward
from sparselora_fx.caching import cache_hook, caching_modules
from sparselora_fx.conventions import Convention
from sparselora_fx.copies import OWNER, forget_plain, keep_plain
from sparselora_fx.cuda_graphs import CudaGraphs
from sparselora_fx.dense_phase import Collector
from sparselora_fx.estimator import SVDEstimator
from sparselora_fx.frozen import FrozenWeight
from sparselora_fx.hooks import OBSERVED, Mark, Phase, label_hook, site_hook
from sparselora_fx.named_tokens import KeptLabels
from sparselora_fx.outcomes import Seen, note_outcomes
from sparselora_fx.pipeline import GraphReport
from sparselora_fx.plan import Sparsity, SparsityPlan
from sparselora_fx.recompiles import Recompiles
from sparselora_fx.regions import SiteSpec
from sparselora_fx.schedule import refreshes, share_at
from sparselora_fx.tally import TokenTally
from sparselora_fx.weights import GatherLayout

ATTRIBUTE = "_sparselora_fx"  # where a model keeps its State; in __dict__ only, never in state_dict


@dataclass
class State:
    """Everything `restore` must undo, and everything `explain` and `record` read."""

    model: nn.Module
    plan: SparsityPlan
    sparsity: dict[str, Sparsity]
    frozen: list[FrozenWeight]
    convention: Convention = field(default_factory=lambda: Convention(True))
    collector: Collector | None = None  # of a plan that calibrates in the dense phase
    cuda_graphs: CudaGraphs | None = None
    phase: Phase = field(default_factory=Phase)
    kept_labels: KeptLabels | None = None  # of the present batch, which the model does not get
    tally: TokenTally = field(default_factory=TokenTally)
    active: bool = True
    every_token: bool = False  # is sparse: one token grid would have to serve two stacks
    padded: bool = False  # a sparse step has had padding
    forced: float | None = None  # the share while `ahead` compiles for it
    ahead: bool = False  # compile the levels to come before the next training call
    blocks: dict[str, nn.Module] = field(default_factory=dict)  # those compiled one by one
    seen: dict[str, Seen] = field(default_factory=dict)
    recorders: list[Any] = field(default_factory=list)  # those of the open `record` blocks
    recompiles: Recompiles = field(default_factory=Recompiles)
    calls: int = 0  # compiled calls of the model
    dense_calls: set[str] = field(default_factory=set)  # why training calls were dense as a whole
    step: tuple[int, int | None] | None = None  # (step, total), once something drives the schedule
    measured: Mapping[str, Sparsity] | None = None  # by `sensitivity`: what evaluation calls skip
    # What the sites' specs say: the share of the plan's sparsity, and whether they are observed.
    words_set: tuple[float, bool] | None = None
    told: set[str] = field(default_factory=set)  # what `warn_once` has said
    stepped: bool = False  # a sparse training call has run to its end
    handles: list[Any] = field(default_factory=list)
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)
    layout: GatherLayout = field(default_factory=GatherLayout)
    known: dict[str, tuple[str, ...]] = field(default_factory=dict)  # words of further vectors

    def __post_init__(self) -> None:
        self.names = self._names()

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return self.recompiles.graphs

    def name_of(self, weight: Tensor) -> str | None:
        """The module name of a frozen weight that a graph was called with."""
        found = self.names.get(id(weight))
        if found is None or found.module._parameters.get(found.param) is not weight:
            self.names = self._names()  # parameters may have been replaced since
            found = self.names.get(id(weight))
        return None if found is None else found.name

    def _names(self) -> dict[int, FrozenWeight]:
        held = {w.name: w.module._parameters.get(w.param) for w in self.frozen}
        return {id(held[w.name]): w for w in self.frozen if held[w.name] is not None}

    def shares(self) -> list[float]:
        """Every share that the schedule takes as it is driven now, rising."""
        plan = self.plan
        if self.step is None:
            return [1.0]
        stages = {share for _, share in plan.ramp} or {1.0}
        dense = plan.start_step or plan.end_step is not None or plan.ramp or plan.refresh
        return sorted({*stages, 0.0} if dense else stages)

    def share(self) -> float:
        """The share of the plan's sparsity that is on now: 0 is dense."""
        plan = self.plan
        if self.forced is not None:
            return self.forced
        if self.step is not None:
            share = share_at(*self.step, plan.start_step, plan.end_step, plan.ramp)
            return 0.0 if share and self.refreshes() else share
        if plan.start_step or plan.end_step is not None or plan.ramp:
            self.warn_once(
                "nothing drives the plan's schedule, so training is sparse from the first call: "
                "add sparselora_fx.SparsityCallback() to the Trainer, call "
                "sparselora_fx.step(model, n, total) before each step, or pass start_step=0"
            )
        return 1.0

    def warn_once(self, text: str) -> None:
        """Warn, unless this model's user has been told."""
        if text not in self.told:
            self.told.add(text)
            warnings.warn(text, stacklevel=5)

    def refreshes(self) -> bool:
        """Whether the present step is one of those that calibrate again."""
        if self.step is None or self.collector is None:
            return False
        return refreshes(self.step[0], self.plan.refresh)

    def mark(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """Put a hook on every module that owns a frozen weight, and factors on those that the plan
        makes sparse; and one on the output embedding, if given.

        Dense ones need the hook too: Dynamo does not guard whether a module has hooks, but it does
        guard what they read, and without that a sparse block would run a dense block's graph.
        """
        owners: dict[nn.Module, list[Mark]] = {}
        for weight in self.frozen:
            names = (f"_sparselora_a_{weight.param}", f"_sparselora_b_{weight.param}")
            sparse = max(self.sparsity[weight.name]) > 0
            more = (vectors or {}).get(weight.canonical, {}) if sparse else {}
            self.known[weight.name] = tuple(more)
            buffers = tuple(self._attach(weight, word, values) for word, values in more.items())
            mark = Mark(weight.param, *names, buffers, spec_name(weight))
            owners.setdefault(weight.module, []).append(mark)
            if not sparse:
                continue
            like = weight.weight
            none = like.new_empty(
                0, 0
            )  # an estimator may know producers only; consumers are not scored
            known = factors.get(weight.canonical, (none, none))
            for word, factor in zip("ab", known, strict=True):
                self._attach(weight, word, factor.to(like.dtype))
        for module, marks in owners.items():
            hook = site_hook(self.phase.key, tuple(marks))
            self._hang(module, hook, with_kwargs=True)
        self.layout.apply(self.model, [w for w in self.frozen if max(self.sparsity[w.name]) > 0])

    def set_share(self, share: float, *, observed: bool = False) -> None:
        """Tell every site how sparse it is: ``share`` times the plan's sparsity. With ``observed``
        (and a share of 0) those that the plan makes sparse are told that their input is looked
        at."""
        if (share, observed) == self.words_set:
            return
        self.set_sparsity(
            {name: Sparsity(s.ffn * share, s.attention * share)
             for name, s in self.sparsity.items()}
        )  # fmt: skip
        for weight in self.frozen if observed else ():
            if max(self.sparsity[weight.name]) > 0:
                weight.module.__dict__[spec_name(weight)] = OBSERVED
        self.words_set = (share, observed)

    def set_sparsity(self, sparsity: Mapping[str, Sparsity]) -> None:
        """Tell every site how sparse it is, by `FrozenWeight.name`; those left out are dense.

        The words stand on each module, where Dynamo guards them: a graph depends on its own
        sites' sparsity only, so blocks that are compiled one by one share what they have in common.
        """
        self.words_set = None
        for weight in self.frozen:
            own = sparsity.get(weight.name, Sparsity(0.0, 0.0))
            dense = max(own) == 0
            words = () if dense else self.known.get(weight.name, ())
            spec = SiteSpec(*own, words, kn=weight.transposed and not dense)
            weight.module.__dict__[spec_name(weight)] = spec.encode()

    def _attach(self, weight: FrozenWeight, word: str, values: Tensor) -> str:
        name = f"_sparselora_{word}_{weight.param}"
        placed = values.to(device=weight.weight.device)
        weight.module.register_buffer(name, placed, persistent=False)
        self.buffers.append((weight.module, name))
        return name

    def place(self, estimator: SVDEstimator) -> None:
        """Put an estimator's factors and vectors where `mark` has put others of the same shapes.

        In place, so that graphs compiled for those stay right; what the estimator lacks is zero.
        """
        assert self.collector is not None
        vectors = estimator.vectors(self.frozen, self.collector.score)
        with torch.no_grad():
            for weight in (w for w in self.frozen if max(self.sparsity[w.name]) > 0):
                pair = estimator.factors[weight.canonical]
                values = {"a": pair.a, "b": pair.b, **vectors[weight.canonical]}
                for word in ("a", "b", *self.known[weight.name]):
                    buffer = weight.module._buffers[f"_sparselora_{word}_{weight.param}"]
                    assert buffer is not None
                    known = values.get(word, buffer.new_zeros(0))
                    buffer.copy_(known) if len(known) else buffer.zero_()

    def end_dense_phase(self) -> None:
        """Build and place the factors, unless that was done; before the first sparse call."""
        if self.collector is not None and self.collector.estimator is None:
            self.place(self.collector.build())

    def collect(self, report: GraphReport, args: tuple[Any, ...], extra: Sequence[Tensor]) -> None:
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

    def mark_model(self, head: nn.Module | None) -> None:
        """Put a hook on the output embedding, if given, which says which of its rows carry a label,
        and on every model of transformers that may make a KV cache."""
        if head is not None:
            self._hang(head, label_hook(self.phase.key), with_kwargs=False)
        for module in caching_modules(self.model):
            self._hang(module, cache_hook(self.phase.key, module), with_kwargs=True)

    def _hang(self, module: nn.Module, hook: Any, *, with_kwargs: bool) -> None:
        hook.__dict__[OWNER] = self
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        keep_plain(module)

    def unmark(self) -> None:
        """Take hooks, factors and specs off again."""
        for handle in self.handles:
            handle.remove()
        for module, name in self.buffers:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for weight in self.frozen:
            weight.module.__dict__.pop(spec_name(weight), None)
        for module in (*self.model.modules(), *(weight.module for weight in self.frozen)):
            forget_plain(module)
        self.phase.close()
        self.handles.clear()
        self.buffers.clear()
        self.layout.restore()

    def observe(self, report: GraphReport, args: tuple[Any, ...]) -> None:
        """Note what a graph did to the weights it was called with (one graph serves many
        layers)."""
        note_outcomes(self.seen, report, args, self.name_of, self.calls)
        for site in (site for region in report.regions for site in region.sites):
            self.phase.sliced.add(id(args[site.weight]))


def marked_by(frozen: Iterable[FrozenWeight]) -> list[State]:
    """The states of compiled models that hold any of these weights' modules. A module that was
    copied together with its hooks is none of them."""
    found: dict[int, State] = {}
    for module in (weight.module for weight in frozen):
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, OWNER, None)
            if isinstance(owner, State) and any(w.module is module for w in owner.frozen):
                found[id(owner)] = owner
    return list(found.values())


def spec_name(weight: FrozenWeight) -> str:
    """The attribute of a module that says how sparse a frozen weight of it is now."""
    return f"_sparselora_spec_{weight.param}"
