"""What `compile` puts on a model's modules, and how it comes off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselora_fx.analysis.reasons import NO_FACTORS
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.ir.markers import OBSERVED, SiteSpec
from sparselora_fx.model.attributes import buffer_name, spec_name
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.weight_layout import GatherLayout, likely_consumers
from sparselora_fx.plan.plan import Sparsity
from sparselora_fx.plan.score import Score
from sparselora_fx.runtime.caching import cache_hook, caching_modules
from sparselora_fx.runtime.copies import OWNER, forget_plain, keep_plain
from sparselora_fx.runtime.hooks import SiteAttributes, TraceInputs, label_hook, site_hook
from sparselora_fx.runtime.packed_forward import (
    held_by,
    keep_storage,
    put_forward,
    replace_buffers,
    restore_packed,
)


@dataclass
class Attachment:
    """Hooks, factors and specs on the modules of one model: everything that `restore` must undo.

    ``owner`` is who hooks lead to; ``statistics`` are the names of the vectors beside each weight's
    factors.
    """

    owner: object
    model: nn.Module
    frozen: list[FrozenWeight]
    sparsity: Mapping[str, Sparsity]
    trace_inputs: TraceInputs
    handles: list[RemovableHandle] = field(default_factory=list)
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)
    layout: GatherLayout = field(default_factory=GatherLayout)
    statistics: dict[str, tuple[str, ...]] = field(default_factory=dict)
    packed: dict[str, Tensor] = field(default_factory=dict)  # quantised weights, as last looked at
    by_column: set[str] = field(default_factory=set)  # names of weights likely sliced by column
    withheld: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # their factors

    def mark(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Put a hook on every module that owns a frozen weight, and factors on those that the plan
        makes sparse and that are likely producers: nobody reads those of consumers. Should a graph
        ask for them all the same, `give` places them.

        Dense ones need the hook too: Dynamo does not guard whether a module has hooks, but it does
        guard what they read, and without that a sparse block would run a dense block's graph.
        """
        owners: dict[nn.Module, list[SiteAttributes]] = {}
        planned = [w for w in self.frozen if max(self.sparsity[w.name]) > 0]
        self.by_column = {w.name for w in likely_consumers(planned)}
        for weight in self.frozen:
            names = (buffer_name(weight.param, "a"), buffer_name(weight.param, "b"))
            sparse = max(self.sparsity[weight.name]) > 0
            more = (vectors or {}).get(weight.canonical, {}) if sparse else {}
            self.statistics[weight.name] = tuple(more)
            buffers = tuple(self._attach(weight, what, values) for what, values in more.items())
            held_in = self._attach_packed(weight, sparse=sparse) or weight.param
            mark = SiteAttributes(held_in, *names, buffers, spec_name(weight.param))
            owners.setdefault(weight.module, []).append(mark)
            if not sparse:
                continue
            # An estimator may know producers only.
            none = torch.empty(0, 0, dtype=weight.dtype)
            known = factors.get(weight.canonical, (none, none))
            if weight.name in self.by_column:
                self.withheld[weight.name], known = known, (none, none)
            for what, factor in zip("ab", known, strict=True):
                self._attach(weight, what, factor.to(weight.dtype))
        for module, marks in owners.items():
            hook = site_hook(self.trace_inputs.key, tuple(marks))
            self._hang(module, hook, with_kwargs=True)
        self.layout.apply(self.model, [weight for weight in planned if weight.packed is None])

    def _attach_packed(self, weight: FrozenWeight, *, sparse: bool) -> str:
        """Let graphs reach a quantised weight and, if the plan makes it sparse, what says what it
        means. Returns the name of the buffer that holds it; empty: the weight is plain."""
        packed = weight.packed
        if packed is None:
            return ""
        if sparse:
            held = held_by(packed, by_column=weight.name in self.by_column)
            names = tuple(self._attach(weight, f"held{i}", value) for i, value in enumerate(held))
            put_forward(weight.module, packed, names, spec_name(weight.param))
        keep_storage(weight.module)
        self.packed[weight.name] = weight.weight
        return self._attach(weight, "packed", packed.storage)

    def refresh_packed(self) -> None:
        """Let graphs reach the quantised weights that stand on the modules now: merging an adapter
        and taking it out again quantises anew.

        Raises:
            CompileError: one is quantised in another way than before, or not at all.
        """
        for weight in self.frozen if self.packed else ():
            known = self.packed.get(weight.name)
            if known is None or weight.module._parameters.get(weight.param) is known:
                continue
            replace_buffers(weight, by_column=weight.name in self.by_column)
            self.packed[weight.name] = weight.weight

    def mark_model(self, head: nn.Module | None) -> None:
        """Put a hook on the output embedding, if given, which says which of its rows carry a label,
        and on every model of transformers that may make a KV cache."""
        if head is not None:
            self._hang(head, label_hook(self.trace_inputs.key), with_kwargs=False)
        for module in caching_modules(self.model):
            self._hang(module, cache_hook(self.trace_inputs.key, module), with_kwargs=True)

    def set_sparsity(self, sparsity: Mapping[str, Sparsity]) -> None:
        """Tell every site how sparse it is, by `FrozenWeight.name`; those left out are dense.

        The specs stand on each module, where Dynamo guards them: a graph depends on its own
        sites' sparsity only, so blocks that are compiled one by one share what they have in common.
        """
        for weight in self.frozen:
            own = sparsity.get(weight.name, Sparsity(0.0, 0.0))
            dense = max(own) == 0
            named = () if dense else self.statistics.get(weight.name, ())
            spec = SiteSpec(*own, named, kn=weight.transposed and not dense)
            weight.module.__dict__[spec_name(weight.param)] = spec.encode()

    def set_observed(self) -> None:
        """Tell the sites that the plan makes sparse that their input is looked at."""
        for weight in self.frozen:
            if max(self.sparsity[weight.name]) > 0:
                weight.module.__dict__[spec_name(weight.param)] = OBSERVED

    def place(self, estimator: SVDEstimator, score: Score) -> None:
        """Put an estimator's factors, and the vectors that a score needs, where `mark` has put
        others of the same shapes.

        In place, so that graphs compiled for those stay right; what the estimator lacks is zero.
        """
        vectors = estimator.vectors(self.frozen, score)
        with torch.no_grad():
            for weight in (w for w in self.frozen if max(self.sparsity[w.name]) > 0):
                pair = estimator.factors[weight.canonical]
                values = {"a": pair.a, "b": pair.b, **vectors[weight.canonical]}
                held = () if weight.name in self.withheld else ("a", "b")
                if not held:
                    self.withheld[weight.name] = (pair.a, pair.b)
                for what in (*held, *self.statistics[weight.name]):
                    buffer = weight.module._buffers[buffer_name(weight.param, what)]
                    assert buffer is not None
                    known = values.get(what, buffer.new_zeros(0))
                    buffer.copy_(known) if len(known) else buffer.zero_()

    def own_buffers(self) -> Iterator[Tensor]:
        """The factors and statistics on the modules, which no step changes."""
        found = (module._buffers.get(name) for module, name in self.buffers)
        return (buffer for buffer in found if buffer is not None)

    def completes(
        self, report: GraphReport, inputs: Sequence[object], name_of: Callable[[object], str | None]
    ) -> bool:
        """Place the factors that a graph lacks, of weights that were taken for consumers and are
        producers in it. Returns whether there were any."""
        lacking = {name_of(inputs[s.weight]) for s in report.dense if s.reason == NO_FACTORS}
        given = False
        for weight in (w for w in self.frozen if w.name in lacking):
            for what, factor in zip("ab", self.withheld.pop(weight.name, ()), strict=False):
                placed = factor.to(device=weight.weight.device, dtype=weight.dtype)
                weight.module._buffers[buffer_name(weight.param, what)] = placed
                given |= placed.numel() > 0
        return given

    def unhook(self) -> None:
        """Take the hooks off alone: nothing is marked any more."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def unmark(self) -> None:
        """Take hooks, factors and specs off again."""
        self.unhook()
        restore_packed(self.frozen)
        for module, name in self.buffers:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for weight in self.frozen:
            weight.module.__dict__.pop(spec_name(weight.param), None)
        for module in (*self.model.modules(), *(weight.module for weight in self.frozen)):
            forget_plain(module)
        self.trace_inputs.close()
        self.buffers.clear()
        self.withheld.clear()
        self.layout.restore()

    def _attach(self, weight: FrozenWeight, what: str, values: Tensor) -> str:
        name = buffer_name(weight.param, what)
        placed = values.to(device=weight.weight.device)
        weight.module.register_buffer(name, placed, persistent=False)
        self.buffers.append((weight.module, name))
        return name

    def _hang(self, module: nn.Module, hook: Callable[..., object], *, with_kwargs: bool) -> None:
        hook.__dict__[OWNER] = self.owner
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        keep_plain(module)
