"""What a node of a graph holds of the sites' channels: the vocabulary of `propagate`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparselora_fx.layout import Layout
from sparselora_fx.regions import Attention, Site, Source


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
class Scores:
    """Attention scores or probabilities: made from queries and keys."""

    query: Channels
    key: Channels
    roots: frozenset[Source]


Value = Channels | Scores | tuple[Channels, ...]
Values = dict[fx.Node, Value]

CASTS = {
    "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach", "type",
}  # fmt: skip
RESHAPES = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "view_as",
    "unsqueeze",
    "squeeze",
    "reshape_as",
}
PERMUTES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "moveaxis"}
SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes"}
NORMS = {"layer_norm", "rms_norm"}
REDUCTIONS = {"mean", "sum", "var", "std", "norm", "amax", "linalg_vector_norm", "vector_norm"}


def completes_site(node: fx.Node, value: Value) -> bool:
    """Whether a node adds a site's bias or LoRA branch: the channels stay where they are."""
    sites = [root for root in sources_of(value) if isinstance(root, Site)]
    return any(node in site.adapter_adds or node in site.bias_adds for site in sites)


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
