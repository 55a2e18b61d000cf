"""Where nothing of a model can be sliced: say so once, and train on dense."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from sparselora_fx.analysis.reasons import OF_CALL
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.model.adapter_kinds import UNTRACEABLE, WHY, adapter_kind
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.notices import Notices
from sparselora_fx.plan.plan import Sparsity
from sparselora_fx.runtime.calls import Call
from sparselora_fx.runtime.hooks import TraceInputs
from sparselora_fx.runtime.outcomes import SiteOutcome

_NODE = re.compile(r" \([a-z_0-9]+\)")  # a node's name: other ones in other graphs
_MOST = 3  # reasons that are named


class Judged(Protocol):
    """What is asked of the runtime of a compiled model, which says what each of these is."""

    model: nn.Module
    frozen: list[FrozenWeight]
    sparsity: dict[str, Sparsity]
    seen: dict[str, SiteOutcome]
    trace_inputs: TraceInputs
    call: Call
    specs_set: tuple[float, bool] | None
    given_up: bool
    caps: dict[str, Sparsity]
    notices: Notices

    @property
    def graphs(self) -> int: ...
    def sparsity_scales(self) -> list[float]: ...
    def name_of(self, weight: object) -> str | None: ...
    def observe(self, report: GraphReport, args: tuple[object, ...]) -> None: ...


def slices_nothing(runtime: Judged, report: GraphReport, inputs: Sequence[object]) -> bool:
    """Whether one graph shows that no call will slice anything: it holds all linears that the plan
    makes sparse, and none is in a region. If so, users are told, and the call must begin anew."""
    if not _is_decisive(runtime) or report.regions:
        return False
    known = [runtime.name_of(inputs[site.weight]) for site in report.dense]
    if not _planned(runtime) <= set(known) or any(
        map(_is_of_call, (s.reason for s in report.dense))
    ):
        return False
    runtime.observe(report, tuple(inputs))
    give_up(runtime)
    return True


def note_call(runtime: Judged) -> None:
    """After a sparse training call: if none of its graphs sliced anything, later ones are dense."""
    if not runtime.graphs:  # the compiler is switched off for now
        return
    if not _is_decisive(runtime):
        return
    if not any(_is_of_call(seen.report.reason) for seen in runtime.seen.values()):
        give_up(runtime)


def is_hopeless(runtime: Judged) -> bool:
    """Whether all linears that the plan makes sparse have adapters that no graph holds; if so,
    users are told, and training is dense from the start."""
    planned = [w for w in runtime.frozen if w.name in _planned(runtime)]
    if planned and all(adapter_kind(runtime.model, w) in UNTRACEABLE for w in planned):
        give_up(runtime)
    return runtime.given_up


def give_up(runtime: Judged) -> None:
    """Train on dense, and say why nothing is sparse."""
    runtime.given_up = True
    planned = _planned(runtime)
    text = _reasons(runtime, runtime.seen)
    runtime.notices.warn(
        f"0 of {len(planned)} linears are sparse, because: {text}. Training is dense, as under "
        "torch.compile alone; sparselora_fx.explain(model) has a line for each linear"
    )


def _is_decisive(runtime: Judged) -> bool:
    """Whether the present call tells of all to come: a training call, at the schedule's last
    level."""
    if runtime.trace_inputs.sliced or runtime.caps or not runtime.call.is_step:
        return False  # the usual case costs nothing
    specs = runtime.specs_set
    if specs is None or specs[0] <= 0 or specs[0] < max(runtime.sparsity_scales()):
        return False
    return bool(_planned(runtime))


def _is_of_call(reason: str) -> bool:
    return any(words in reason for words in OF_CALL)


def _planned(runtime: Judged) -> set[str]:
    return {name for name, own in runtime.sparsity.items() if max(own) > 0}


def _reasons(runtime: Judged, seen: Mapping[str, SiteOutcome]) -> str:
    """The most frequent reasons, each with how many linears have it."""
    planned, found = _planned(runtime), Counter[str]()
    for weight in (w for w in runtime.frozen if w.name in planned):
        reason = "no compiled graph multiplies with it"
        if weight.name in seen:
            reason = _NODE.sub("", seen[weight.name].report.reason)
        kind = adapter_kind(runtime.model, weight)
        found[f"its adapter, {kind}, {WHY[kind]}" if kind in WHY else reason] += 1
    named = [f"{reason} ({count} linears)" for reason, count in found.most_common(_MOST)]
    rest = sum(found.values()) - sum(count for _, count in found.most_common(_MOST))
    return "; ".join([*named, *([f"other reasons ({rest})"] if rest else [])])
