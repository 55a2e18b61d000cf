"""What became of each frozen linear, and why: the facts that `explain` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparselora_fx.model.adapter_kinds import UNTRACEABLE, WHY, adapter_kind, adapter_words
from sparselora_fx.model.frozen_weights import FrozenWeight, frozen_stacks
from sparselora_fx.model.opaque import opaque_modules
from sparselora_fx.runtime.outcomes import SiteOutcome
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.tally import TokenTally

_STACK = "a stack of matrices, one for each expert or head, is no linear"
_UNREACHED = (
    "its module did not run, an adapter computes another weight from this one, or a graph break "
    "inside a checkpointed block left the block to plain PyTorch"
)
_EAGER = (
    "its module runs in code that torch.compile leaves to plain PyTorch: behind a graph break, in "
    "a function that is kept from compiling, or with the compiler switched off"
)
_PAST = (
    "training ran past the compiled forward, so nothing was sliced; call the model that "
    "sparselora_fx.compile returned, not a module inside it"
)

_FEW = (
    "hardly a token was sparse in any step so far, and such steps run dense (the plan's min_sparse)"
)


@dataclass(frozen=True)
class LinearRow:
    """One frozen linear (or what looks like one: ``linear`` tells).

    Attributes:
        name: of its module, with the parameter behind it where that is no ``weight``.
        shape: "out x in" channels, or "".
        region, kind, kept: of a sliced one: its region's module, "ffn" or "attention", "k of N".
        role: "out" (rows are kept), "in" (columns), or "" for a dense one.
        note: of a sliced one what else there is to say; of a dense one the reason.
        waiting: no step has shown yet what becomes of it.
        linear: it is one of the model's frozen linears.
    """

    name: str
    shape: str = "-"
    region: str = ""
    kind: str = ""
    kept: str = ""
    role: str = ""
    note: str = ""
    waiting: bool = False
    linear: bool = True

    @property
    def sliced(self) -> bool:
        """Whether it was rewritten, in some of its uses at least."""
        return bool(self.role)

    @property
    def status(self) -> str:
        """The row's last cell, in words."""
        if self.sliced:
            return f"rewritten ({'rows' if self.role == 'out' else 'columns'}){self.note}"
        return self.note if self.waiting else f"dense{self.note}"


def linear_rows(
    runtime: Runtime, seen: Mapping[str, SiteOutcome], tally: TokenTally, *, traced: bool
) -> list[LinearRow]:
    """A row for each frozen linear in the order of the model, then for what can be none: stacks of
    matrices, quantised layers. ``seen``, ``tally``: what graphs and calls told; ``traced``: a batch
    was traced for it.
    """
    few = tally.only_dense
    rows = [_row(runtime, weight, seen, few=few, traced=traced) for weight in runtime.frozen]
    return rows + _no_linears(runtime.model)


def _no_linears(model: nn.Module) -> list[LinearRow]:
    stacks = [
        LinearRow(name, "x".join(map(str, shape)), note=f": {_STACK}", linear=False)
        for name, shape in frozen_stacks(model)
    ]
    opaque = [
        LinearRow(item.name, note=f": {item.why}", linear=False) for item in opaque_modules(model)
    ]
    return stacks + opaque


def _row(
    runtime: Runtime,
    weight: FrozenWeight,
    known: Mapping[str, SiteOutcome],
    *,
    few: bool,
    traced: bool,
) -> LinearRow:
    name, shape = weight.name, f"{weight.out_features}x{weight.in_features}"
    seen = known.get(name)
    if max(runtime.sparsity[name]) == 0:
        return LinearRow(name, shape, note=": the plan keeps it dense (sparsity 0)")
    if seen is None:
        ran = not few if traced else bool(runtime.stepped or known)
        why = _why_unseen(runtime, weight, ran=ran, few=few)
        if why:
            return LinearRow(name, shape, note=why)
        sparsity = runtime.sparsity[name]
        words = f"ffn {sparsity.ffn:g}, attention {sparsity.attention:g}"
        text = f"not traced yet (plan: {words}); run a training step, or pass a batch"
        return LinearRow(name, shape, note=text, waiting=True)
    if not seen.sliced:
        adapter = adapter_words(adapter_kind(runtime.model, weight))
        return LinearRow(name, shape, note=f": {seen.report.reason}{adapter}")
    uses, note = seen.sliced + len(seen.dense), ""
    if seen.dense:
        note = f" in {seen.sliced} of its {uses} uses, dense in others: {seen.dense[0]}"
    elif uses > 1:
        note = f", {uses} uses, each with a choice of its own"
    if weight.packed is not None:
        note += f", unpacked from {weight.packed.quantiser}"
    return LinearRow(name, shape, seen.region, seen.kind, seen.kept, seen.report.role, note)


def _why_unseen(runtime: Runtime, weight: FrozenWeight, *, ran: bool, few: bool) -> str:
    """Why no graph has told anything of a weight that the plan makes sparse; "" if none ran.
    ``ran``: a sparse one has; ``few``: calls were dense, as hardly a token was sparse."""
    if runtime.blocks and not any(weight.name.startswith(f"{block}.") for block in runtime.blocks):
        return ": outside the blocks that regional=True compiles"
    phase, held = runtime.trace_inputs, id(weight.traced)
    kind = adapter_kind(runtime.model, weight)
    if kind in UNTRACEABLE:
        return f": its adapter, {kind}, {WHY[kind]}"
    if ran:
        why = _EAGER if held in phase.eager else _UNREACHED
        return f": no compiled graph multiplies with it ({why})"
    if few:
        return f": {_FEW}"
    if runtime.dense_calls:
        return f" in every training call so far ({', '.join(sorted(runtime.dense_calls))})"
    return f": {_PAST}" if held in phase.past else ""
