"""What a node of a graph holds of the sites' channels: the vocabulary of `propagate`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparselora_fx.analysis.regions import Attention, Site, Source
from sparselora_fx.graph.layout import Layout


@dataclass(frozen=True)
class Port:
    """Channels of one source, in one layout (None: mixed beyond what a layout can say)."""

    source: Source
    layout: Layout | None


@dataclass(frozen=True)
class Segments:
    """The pieces of a concatenation along one dimension (negative: counted from the last): sizes,
    and what each piece holds."""

    axis: int
    parts: tuple[tuple[int, Channels | None], ...]


@dataclass(frozen=True)
class Channels:
    """A tensor made from sites' outputs. ``moved`` means by data movement only, so it has one
    port."""

    ports: tuple[Port, ...]
    roots: frozenset[Source]
    moved: bool = False
    segments: Segments | None = None


@dataclass(frozen=True)
class AttentionLogits:
    """Attention scores or probabilities: made from queries and keys."""

    query: Channels
    key: Channels
    roots: frozenset[Source]


Value = Channels | AttentionLogits | tuple[Channels, ...]
Values = dict[fx.Node, Value]


def completes_site(node: fx.Node, value: Value) -> bool:
    """Whether a node adds a site's bias or LoRA branch, or scales its rows as the weight says: the
    channels stay where they are."""
    sites = [root for root in sources_of(value) if isinstance(root, Site)]
    return any(node in parts for s in sites for parts in (s.adapter_adds, s.bias_adds, s.scaling))


def sources_of(value: Value | None) -> frozenset[Source]:
    """Every source whose channels a value was made from."""
    if value is None:
        return frozenset()
    if isinstance(value, tuple):
        return frozenset().union(*(part.roots for part in value))
    return value.roots


def attention_of(value: Channels) -> Attention | None:
    """The one attention among a value's ports, if there is exactly one."""
    found = {port.source for port in value.ports if isinstance(port.source, Attention)}
    return found.pop() if len(found) == 1 else None
