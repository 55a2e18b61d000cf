"""Record which channels the compiled graphs chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from sparselora_fx._torch import in_backward
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.runtime.outcomes import common_module, numbered
from sparselora_fx.runtime.runtime import Runtime, get_runtime

Entry = TypeVar("Entry")


@dataclass
class Recording:
    """Channel choices of the training calls made inside `record`; a later call replaces an earlier
    one's entries.

    Where one call of the model makes several choices under one name (a block that is applied twice,
    two feed-forwards side by side in one module), the first has the name and the next ones end in
    ``#2``, ``#3``, in the order in which they are computed.

    Attributes:
        selections: region's module name -> ``{"ffn": int64[k]}`` or ``{"qk": int64[k], "v":
        int64[k]}`` (kv channels).
        sites: frozen linear's name -> ``("out", rows used)`` or ``("in", columns used)``, both
        int64, on CPU. The name is that of its module, with ``"." + parameter`` where the matrix is
        no ``weight`` of it.
    """

    selections: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sites: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    _call: int = field(default=0, repr=False)
    # What the present call has written: ("site" or "region", name).
    _fresh: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add(
        self,
        report: GraphReport,
        args: tuple[object, ...],
        extra: Sequence[Tensor],
        runtime: Runtime,
    ) -> None:
        """Take over what one graph call chose. ``extra`` are the graph's extra outputs. What a
        backward computes again was recorded before."""
        if in_backward():
            return
        if self._call != runtime.calls:
            self._call, self._fresh = runtime.calls, set()
        for region in report.regions:
            names = [runtime.name_of(args[site.weight]) for site in region.sites]
            chosen = {
                choice: extra[index].detach().clone().cpu()
                for choice, (index, _, _) in region.choices.items()
            }
            where = common_module([name for name in names if name is not None])
            self._select(where, chosen)
            for name, site in zip(names, region.sites, strict=True):
                if name is not None and site.rows is not None:
                    used = (site.role, extra[site.rows].detach().clone().cpu())
                    self.sites[self._key("site", name, self.sites)] = used

    def _select(self, where: str, chosen: dict[str, Tensor]) -> None:
        """Enter a region's choices; a feed-forward and an attention of one module share a key."""
        beside = self.selections.get(where)
        if ("region", where) in self._fresh and beside is not None and not beside.keys() & chosen:
            beside |= chosen
        else:
            self.selections[self._key("region", where, self.selections)] = chosen

    def _key(self, kind: str, name: str, entries: dict[str, Entry]) -> str:
        """The first key of this name that the present call has not written; what earlier calls
        wrote of it goes."""
        first = (kind, name) not in self._fresh
        if first:
            self._fresh.add((kind, name))
            for old in [key for key in entries if key.partition("#")[0] == name]:
                del entries[old]
        return numbered(name, entries)


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the channel choices of every training call made in the block.

    Blocks may nest: each records every call made in it. Costs nothing but the copies: compiled
    graphs always return their selections. Raises `CompileError` if the model was not compiled with
    `sparselora_fx.compile`.
    """
    runtime, recording = get_runtime(model), Recording()
    runtime.recorders.append(recording)
    try:
        yield recording
    finally:
        runtime.recorders = [other for other in runtime.recorders if other is not recording]
