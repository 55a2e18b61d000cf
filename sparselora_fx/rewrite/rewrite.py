"""One graph on its way through the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from sparselora_fx.analysis.channel_values import Values
from sparselora_fx.analysis.regions import Observed, Region, Site, Skip
from sparselora_fx.graph.emit import watch
from sparselora_fx.graph.nodes import cuts_gradient
from sparselora_fx.plan.score import Score


@dataclass(frozen=True)
class Options:
    """What the user chose for the rewrite. ``lora_branch`` is "dense" or "sparse"; ``shift``: the
    model predicts label t + 1 from token t."""

    channel_multiple: int = 16
    lora_branch: str = "dense"
    score: Score = field(default_factory=Score)
    track_adapter: bool = False
    shift: bool = True
    weigh: bool = False  # leave regions dense that are predicted not to pay


@dataclass(frozen=True)
class TracedCall:
    """What is known of the model's call in which a graph is traced: its tensor arguments by name,
    and which of the graph's inputs, by number, hold frozen weights, buffers, and frozen weights
    outside the model's text part."""

    arguments: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: frozenset[int] = frozenset()
    buffers: frozenset[int] = frozenset()
    beside_text: frozenset[int] = frozenset()


@dataclass(eq=False)
class Program:
    """A traced graph with its bodies, and what it was traced with, before any pass changes them."""

    gm: fx.GraphModule
    inputs: Sequence[object]
    options: Options
    call: TracedCall
    padding_unread: frozenset[fx.Node] = frozenset()  # set by find_unread_padding
    orders: Mapping[fx.Node, str] = field(default_factory=dict)  # of markers: `token_orders`
    batch: frozenset[fx.Node] = frozenset()  # the inputs that hold the batch's tokens
    passed: frozenset[fx.Node] = frozenset()  # all inputs that the model's caller gave


@dataclass(eq=False)
class Rewrite:
    """One graph on its way through the passes. Nodes that they make carry values
    (`graph.emit`)."""

    gm: fx.GraphModule
    options: Options
    padding_unread: frozenset[fx.Node] = frozenset()  # these four: those of its `Program`
    orders: Mapping[fx.Node, str] = field(default_factory=dict)
    batch: frozenset[fx.Node] = frozenset()
    passed: frozenset[fx.Node] = frozenset()
    frozen: frozenset[fx.Node] = frozenset()  # inputs that hold frozen weights, marked or not
    sites: list[Site] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    dense: list[Site] = field(default_factory=list)  # marked for their padding alone
    skips: list[Skip] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    values: Values = field(default_factory=dict)  # set by find_regions
    counts: dict[str, int] = field(default_factory=dict)  # changes made, by pass
    traced: frozenset[fx.Node] = frozenset()  # nodes that were there before any pass ran
    unread: frozenset[fx.Node] = frozenset()  # those of them that nobody read
    cuts_gradients: bool = False  # the model itself keeps some value's gradient from flowing back

    def __post_init__(self) -> None:
        watch(self.gm)
        self.traced = frozenset(self.gm.graph.nodes)
        self.unread = frozenset(node for node in self.traced if not node.users)
        self.cuts_gradients = any(cuts_gradient(node) for node in self.traced)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph
