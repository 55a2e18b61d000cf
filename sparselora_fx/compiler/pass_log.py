"""What each pass did to one graph: how many ops of each kind it left, and, where somebody asks, the
graph itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from sparselora_fx import _torch
from sparselora_fx.compiler.readable import readable
from sparselora_fx.graph.nodes import op_name

log = logging.getLogger("sparselora_fx.compiler.pipeline")


@dataclass(frozen=True)
class PassRecord:
    """One pass over one graph.

    Attributes:
        number, total: its place among the passes, from 1.
        name: of the pass.
        part: "" for the graph itself, else the name of the body (a checkpointed block, say).
        changes: what the pass says it changed.
        seconds: how long it took.
        before, after: how many nodes there are of each op.
        text: the graph after it, if texts are kept (see `readable`); "" where nothing changed.
    """

    number: int
    total: int
    name: str
    part: str
    changes: int
    seconds: float
    before: Mapping[str, int]
    after: Mapping[str, int]
    text: str = ""

    @property
    def difference(self) -> str:
        """``linear: 12 -> 8 (-4), take: 0 -> 2 (+2)``; "" if no op came or went."""
        before, after = Counter(self.before), Counter(self.after)
        names = sorted(name for name in {*before, *after} if before[name] != after[name])
        return ", ".join(
            f"{n}: {before[n]} -> {after[n]} ({after[n] - before[n]:+d})" for n in names
        )


PassHook = Callable[[PassRecord, fx.GraphModule], None]


class _State(NamedTuple):
    """Where a graph is: the passes it goes through, those it has been through, what it is now."""

    of: int
    number: int
    counts: Counter[str]
    text: str


@dataclass
class PassLog:
    """Follows one graph, and its bodies, through the passes.

    Attributes:
        texts: keep the graph's text before the first pass and after each that changes something.
        hook: called after each pass with its record and the graph, which it may change.
        start: by part, the text before the first pass.
        records: one for each pass, in the order in which they ran.
    """

    texts: bool = False
    hook: PassHook | None = None
    start: dict[str, str] = field(default_factory=dict)
    records: list[PassRecord] = field(default_factory=list)
    _now: dict[str, _State] = field(default_factory=dict, repr=False)

    def begin(self, gm: fx.GraphModule, part: str, *, of: int) -> None:
        """A graph, or a body, is about to go through ``of`` passes."""
        text = self.start[part] = self._text(gm, f"0.traced{_dotted(part)}")
        self._now[part] = _State(of, 0, op_counts(gm.graph), text)

    def after(self, gm: fx.GraphModule, part: str, name: str, changes: int, seconds: float) -> None:
        """A pass has made so many changes in so many seconds."""
        now = self._now[part]
        number, before, last = now.number + 1, now.counts, now.text
        counts, text = before, last
        if changes:
            counts = op_counts(gm.graph)
            text = self._text(gm, f"{number}.{name}{_dotted(part)}")
        self._now[part] = _State(now.of, number, counts, text)
        shown = text if text != last else ""
        record = PassRecord(
            number, now.of, name, part, changes, seconds, dict(before), dict(counts), shown
        )
        self.records.append(record)
        log.debug("%d/%d %s: %d matched in %.1f ms", number, now.of, name, changes, 1e3 * seconds)
        if changes:
            log.debug("%s", record.difference or "graph unchanged")
            log.debug("after %s:\n%s", name, gm.graph)
        if self.hook is not None:
            self.hook(record, gm)

    def _text(self, gm: fx.GraphModule, name: str) -> str:
        """The graph's text, if texts are kept; an artifact of ``TORCH_TRACE``, if that is on."""
        traced = _torch.is_traced()
        text = readable(gm.graph) if self.texts or traced else ""
        if traced:
            _torch.trace_artifact(f"sparselora_fx.{name}", text)
        return text if self.texts else ""


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How many nodes a graph has of each op."""
    return Counter(map(op_name, graph.nodes))


def _dotted(part: str) -> str:
    return f".{part}" if part else ""
