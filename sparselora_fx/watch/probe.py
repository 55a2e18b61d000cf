"""What one probe found, and the history of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist


@dataclass
class Probe:
    """One comparison of a sparse step with a dense forward of the same micro-batch.

    Attributes:
        step: 0-based optimizer step (or call, where nothing drives the schedule).
        loss_gap: sparse minus dense loss, in nats per output token; None if the model returned no
            loss, NaN if one of them was not finite.
        regions: by region, |sparse output - dense output| / |dense output| on sampled context
            tokens, both from the dense run's inputs: a region answers for itself alone.
        faults: what is broken rather than drifting, in words; each names a region or a graph.
        blamed: the regions that faults name and that can be blamed on sparsity.
        action: what the watch did about it; None: nothing.
        sliced: the regions of the step: their kind, and the frozen linears that belong to them.
    """

    step: int
    loss_gap: float | None
    regions: dict[str, float]
    faults: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)
    action: str | None = None
    sliced: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values; what is not finite is None, as JSON knows no NaN."""
        return {
            "step": self.step,
            "loss_gap": _finite(self.loss_gap),
            "regions": {name: _finite(error) for name, error in self.regions.items()},
            "action": self.action,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def merged(probes: Iterable[Probe]) -> Probe:
    """What several processes found in one step: of everything the worst."""
    first, *others = probes
    regions: dict[str, float] = dict(first.regions)
    gaps = [p.loss_gap for p in (first, *others) if p.loss_gap is not None]
    for other in others:
        for name, error in other.regions.items():
            regions[name] = _worst([regions.get(name, 0.0), error])
    faults = dict.fromkeys(text for probe in (first, *others) for text in probe.faults)
    blamed = dict.fromkeys(name for probe in (first, *others) for name in probe.blamed)
    sliced = {name: found for probe in (first, *others) for name, found in probe.sliced.items()}
    return Probe(
        first.step,
        _worst(gaps) if gaps else None,
        dict(sorted(regions.items())),
        list(faults),
        list(blamed),
        sliced=dict(sorted(sliced.items())),
    )


def _worst(values: list[float]) -> float:
    """The value furthest from zero; NaN if there is one."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))


def processes() -> int:
    """How many processes train together."""
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def agreed(probe: Probe | None) -> Probe | None:
    """The probe of all processes that train together, the same in each; None: nobody has one.
    Collective: every process calls it, whether its own step was probed or not."""
    found: list[Probe | None] = [None] * processes()
    dist.all_gather_object(found, probe)
    taken = [one for one in found if one is not None]
    return merged(taken) if taken else None


def from_json(entry: Mapping[str, Any]) -> Probe:
    """Read `Probe.to_json` back."""
    return Probe(entry["step"], entry["loss_gap"], dict(entry["regions"]), action=entry["action"])
