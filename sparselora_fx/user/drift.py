"""`drift`: how far sparse training is from dense training, as the watch has seen it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparselora_fx.errors import CompileError
from sparselora_fx.plan.checks import DEFAULTS
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.plan.region_keys import region_keys
from sparselora_fx.runtime.outcomes import common_module
from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.runtime.watching import settle
from sparselora_fx.watch.probe import Probe
from sparselora_fx.watch.state import WatchState


class Drift:
    """The history of a watched model; a copy, which later steps do not change.

    Attributes:
        probes: oldest first.
        levels: by region, the share of its channels that it may skip now.
        seconds: what all probes have cost.
        compiled_levels: how many combinations of levels steps have run at.
        plan: what training is at now, as a plan without stages; ``plan.to_yaml(file)`` keeps it.
    """

    def __init__(self, model: nn.Module) -> None:
        runtime = get_runtime(model)
        state = runtime.watching
        if state is None:
            raise CompileError(
                "this model is not watched; compile it with "
                "sparselora_fx.compile(..., watch=sparselora_fx.Watch())"
            )
        settle(runtime)
        self.probes: list[Probe] = list(state.probes)
        self.levels = dict(state.ladder.levels())
        self.seconds = state.seconds
        self.compiled_levels = len(state.ladder.compiled)
        self.plan = _plan_of(runtime, state)

    def to_json(self) -> dict[str, Any]:
        """``{"probes": [{"step", "loss_gap", "regions": {name: error}, "action"}, ...]}``: a gap in
        nats per output token, errors as shares of a region's output, both None where not finite."""
        return {"probes": [probe.to_json() for probe in self.probes]}

    def __str__(self) -> str:
        lines = [f"{'step':>8}  {'loss gap':>9}  worst region"]
        for probe in self.probes:
            gap = "-" if probe.loss_gap is None else f"{probe.loss_gap:+.4f}"
            worst = max(probe.regions, key=lambda name: probe.regions[name], default=None)
            text = "-" if worst is None else f"{worst} {probe.regions[worst]:.3f}"
            said = [*probe.faults, *([probe.action] if probe.action else [])]
            lines.append("; ".join([f"{probe.step:>8}  {gap:>9}  {text}", *said]))
        lines.append(f"{len(self.probes)} probes took {self.seconds:.2f} s")
        return "\n".join(lines)


def _plan_of(runtime: Runtime, state: WatchState) -> SparsityPlan:
    """The present levels of all regions that were sliced, and the other settings of the plan."""
    caps, names = state.caps(), [weight.name for weight in runtime.frozen]
    levels: dict[str, float] = {}
    for name, sites in state.sites.items():
        own = runtime.sparsity[sites[0]].scaled(1.0, at_most=caps.get(sites[0]))
        level = own[state.kinds[name] != "ffn"]
        for key in region_keys(common_module(sites), sites, names):
            levels[key] = level
    options = {key: getattr(runtime.plan, key) for key in DEFAULTS}
    return SparsityPlan(levels or 0.0, **options | {"max_loss_gap": None, "min_steps": 0})


def drift(model: nn.Module) -> Drift:
    """What the watch of a compiled model has seen, and done.

    Args:
        model: compiled with ``watch=``.

    Raises:
        CompileError: the model is not compiled, or not watched.
    """
    return Drift(model)
