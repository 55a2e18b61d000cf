"""Record which channels the compiled graphs chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparselora_fx.errors import CompileError
from sparselora_fx.pipeline import GraphReport
from sparselora_fx.state import ATTRIBUTE, State, common_module


@dataclass
class Recording:
    """Channel choices of the training calls made inside `record`; a later call replaces an earlier
    one's entries.

    Attributes:
        selections: region's module name -> ``{"ffn": int64[k]}`` or ``{"qk": int64[k], "v":
        int64[k]}`` (kv channels).
        sites: frozen linear's module name -> ``("out", rows used)`` or ``("in", columns used)``,
        both int64, on CPU.
    """

    selections: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sites: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def add(self, report: GraphReport, args: tuple[Any, ...], extra: Any, state: State) -> None:
        """Take over what one graph call chose. ``extra`` are the graph's extra outputs."""
        for region in report.regions:
            names = [state.name_of(args[site.weight]) for site in region.sites]
            known = [name for name in names if name is not None]
            chosen = self.selections.setdefault(common_module(known), {})
            for choice, (index, _, _) in region.choices.items():
                chosen[choice] = extra[index].detach().clone().cpu()
            for name, site in zip(names, region.sites, strict=True):
                if name is not None and site.rows is not None:
                    self.sites[name] = (site.role, extra[site.rows].detach().clone().cpu())


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the channel choices of every training call made in the block.

    Blocks may nest: each records every call made in it. Costs nothing but the copies: compiled
    graphs always return their selections. Raises `CompileError` if the model was not compiled with
    `sparselora_fx.compile`.
    """
    state, recording = get_state(model), Recording()
    state.recorders.append(recording)
    try:
        yield recording
    finally:
        state.recorders = [other for other in state.recorders if other is not recording]


def get_state(model: nn.Module) -> State:
    """The state of a compiled model, or a `CompileError` that says how to get one."""
    state = model.__dict__.get(ATTRIBUTE)
    if not isinstance(state, State):
        raise CompileError(
            f"this {type(model).__name__} is not compiled with sparselora_fx; "
            "call model = sparselora_fx.compile(model, estimator) first and pass that same object"
        )
    return state
