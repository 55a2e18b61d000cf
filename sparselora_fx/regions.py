"""The vocabulary that passes share: sites, regions, skips, and the state of one graph being
rewritten."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx

from sparselora_fx.fx import cuts_gradient
from sparselora_fx.layout import Atom, ChannelMap, merge_atoms, split_atoms
from sparselora_fx.scores import Score

if TYPE_CHECKING:
    from sparselora_fx.token_rows import TokenRows
    from sparselora_fx.values import Values


@dataclass(frozen=True)
class Options:
    """What the user chose for the rewrite. ``lora_branch`` is "dense" or "sparse"; ``shift``: the
    model predicts label t + 1 from token t."""

    channel_multiple: int = 16
    lora_branch: str = "dense"
    score: Score = field(default_factory=Score)
    track_adapter: bool = False
    shift: bool = True


@dataclass(frozen=True)
class SiteSpec:
    """The plan's words for one site, carried through the graph as a string (strings are guarded,
    never traced)."""

    ffn: float
    attention: float
    known: tuple[str, ...] = ()  # names of the vectors that the marker carries besides factors
    kn: bool = False  # its factors take the weight to be stored [K, N], as in a Conv1D

    def encode(self) -> str:
        """A string that `decode` reads back exactly."""
        stored = "kn" if self.kn else "nk"
        return ",".join([repr(self.ffn), repr(self.attention), stored, *self.known])

    @staticmethod
    def decode(text: str) -> SiteSpec:
        """Inverse of `encode`."""
        ffn, attention, stored, *known = text.split(",")
        return SiteSpec(float(ffn), float(attention), tuple(known), stored == "kn")


# The words of a weight that stays dense. Its marker, if there is one, is about padding.
DENSE = SiteSpec(0.0, 0.0).encode()

# How rows stand to the batch's tokens: as those do, tokens before samples, reversed or picked, or
# as no way back to the batch says (`token_order`).
IN_ORDER, SWAPPED, MOVED, UNKNOWN = "in order", "swapped", "moved", "unknown"

PADDED = 9  # tensors that a marker carries in a batch with padding (`tokens.Tokens.tensors`)

# What a marker carries in place of the plan's words where gradients are off inside a call that
# began with them.
WITHOUT_GRADIENTS = "without gradients"


@dataclass(eq=False)
class Site:
    """One frozen linear in a graph: ``linear(x[..., K], weight[N, K], bias) -> node[..., N]``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node  # the placeholder, as stored
    transposed: bool  # stored [K, N]
    bias: fx.Node | None
    factors: tuple[fx.Node, fx.Node]
    tokens: tuple[
        fx.Node, ...
    ]  # counted tokens, perhaps (idx, pos) of context and output tokens, perhaps of two more
    spec: SiteSpec
    out_features: int
    in_features: int
    padding_unread: bool = False  # whether no row of padding in what it returns reaches a loss
    token_rows: TokenRows | None = None  # which tokens they are, if not the batch's one by one
    order: str = UNKNOWN  # how the rows of x stand to the batch's tokens (`token_order`)
    known: dict[str, fx.Node] = field(default_factory=dict)  # what `SiteSpec.known` names
    adapter_adds: dict[fx.Node, fx.Node] = field(
        default_factory=dict
    )  # addition -> the LoRA branch it adds
    bias_adds: set[fx.Node] = field(default_factory=set)  # additions of a bias outside the linear
    adapter_nodes: set[fx.Node] = field(default_factory=set)  # every node of the LoRA branches
    adapter_weights: set[fx.Node] = field(default_factory=set)  # trained matrices they read

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype that the model itself casts the weight to before the linear, or None."""
        x, weight = self.x.meta["example_value"], self.weight.meta["example_value"]
        viewed = self.weight not in self.node.all_input_nodes
        return x.dtype if viewed and x.dtype != weight.dtype else None

    @property
    def token_weight(self) -> fx.Node | None:
        """The tokens that count in scores, or None: all."""
        return self.tokens[0] if self.tokens else None

    @property
    def split(self) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """``([idx, pos] of context tokens, [idx, pos] of dense tokens)``, or None: every token is
        sparse. Dense are output tokens and, unless nobody reads it, padding."""
        if len(self.tokens) < 5:
            return None
        read = len(self.tokens) == PADDED and not self.padding_unread
        return list(self.tokens[1:3]), list(self.tokens[7:9] if read else self.tokens[3:5])

    @property
    def unpadded(self) -> tuple[fx.Node, ...] | None:
        """``(idx, pos)`` of all tokens but padding, or None: there is none, or it is read."""
        return self.tokens[5:7] if len(self.tokens) == PADDED and self.padding_unread else None


class Heads(NamedTuple):
    """How one operand's head and head-channel dimensions move through its site's rows."""

    site: Site
    offset: int
    atoms: tuple[Atom, ...]  # of the head dimensions, outermost first
    dim: int
    repeat_inner: int = 1  # repeats of each head (repeat_kv)
    repeat_outer: int = 1  # repeats of the whole set of heads

    @property
    def number(self) -> int:
        """How many heads there are in the site's rows."""
        return math.prod(int(atom.size) for atom in self.atoms)

    def maps(self, kv_heads: int, group_inner: bool) -> tuple[ChannelMap, ...] | None:
        """Rows of kv channel ``head * dim + d`` in each head that shares the kv head (one map per
        such head), or None if they are no affine map."""
        cut = split_atoms(self.atoms, self.number // kv_heads if group_inner else kv_heads)
        if cut is None:
            return None
        kv, shared = cut if group_inner else cut[::-1]
        run = merge_atoms([*kv, Atom(self.dim, 1)])
        if len(run) > 2 or run[-1].stride != 1:
            return None
        inner, stride = self.dim, self.dim
        if len(run) == 2:
            inner, stride = run[1].size, run[0].stride or 0
        steps = itertools.product(*(range(int(atom.size)) for atom in shared))
        starts = [sum(i * (a.stride or 0) for i, a in zip(s, shared, strict=True)) for s in steps]
        return tuple(ChannelMap(int(inner), stride, self.offset + at) for at in starts)


@dataclass(eq=False)
class Attention:
    """The product of one attention: heads of queries, keys and values, and the node that returns
    the mix. Queries and keys may be a part of each head's channels (the rest is never sliced)."""

    node: fx.Node
    query: Heads
    key: Heads
    value: Heads
    group_inner: bool  # query head h*G+g (True) or g*Hkv+h (False) shares kv head h
    roots: frozenset[Source]

    @property
    def heads(self) -> int:
        return self.query.number

    @property
    def kv_heads(self) -> int:
        return self.key.number

    @property
    def head_dim(self) -> int:
        return self.query.dim

    @property
    def value_dim(self) -> int:
        return self.value.dim


Source = Site | Attention


@dataclass(frozen=True)
class RowPick:
    """Rows of one producer (or columns of the consumer) that a channel selects: one `ChannelMap`
    per offset."""

    site: Site
    maps: tuple[ChannelMap, ...]
    scored: bool = True  # whether its norms say how much a channel matters (a gate's do not)

    @property
    def offsets(self) -> list[int]:
        return [m.offset for m in self.maps]


@dataclass(eq=False)
class Choice:
    """One channel choice of a region: how many channels there are, how many are kept, and the rows
    it selects."""

    name: str  # "ffn", "qk", "v", or "rest..." for rows that are always kept
    channels: int
    kept: int
    producers: list[RowPick]
    selection: fx.Node | None = None  # int64[kept], set by insert_predictor
    whole: bool = False  # rows that no choice may drop: every channel is kept


@dataclass(eq=False)
class Region:
    """Sites that share channel choices: an FFN (one choice) or an attention (choices "qk" and
    "v")."""

    kind: str  # "ffn" or "attention"
    choices: list[Choice]
    consumer: RowPick  # columns of the consumer selected by the last choice
    attention: Attention | None = None
    rows: dict[Site, fx.Node] = field(default_factory=dict)  # set by slice_sites

    @property
    def sites(self) -> list[Site]:
        picks = [pick for choice in self.choices for pick in choice.producers]
        return list(dict.fromkeys([*(pick.site for pick in picks), self.consumer.site]))


@dataclass(frozen=True, eq=False)
class Skip:
    """A frozen weight that stays dense, and why."""

    weight: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Observed:
    """Rows of what some frozen weights read, in the dense phase. ``taken`` are the rows' indices
    where only the graph knows them; ``kn``: which weights are stored [K, N] (None: not known)."""

    weights: tuple[fx.Node, ...]  # placeholders, in the order of the forward
    kn: tuple[bool | None, ...]
    rows: fx.Node
    taken: fx.Node | None

    @property
    def tensors(self) -> list[fx.Node]:
        return [self.rows] if self.taken is None else [self.rows, self.taken]


@dataclass(eq=False)
class Rewrite:
    """One graph on its way through the passes."""

    gm: fx.GraphModule
    options: Options
    padding_unread: frozenset[fx.Node] = frozenset()  # as `padding.padding_unread` says
    orders: Mapping[fx.Node, str] = field(default_factory=dict)  # of markers, by `token_orders`
    batch: frozenset[fx.Node] = frozenset()  # the inputs that hold the batch's tokens
    passed: frozenset[fx.Node] = frozenset()  # all inputs that the model's caller gave
    frozen: frozenset[fx.Node] = frozenset()  # inputs that hold frozen weights, marked or not
    sites: list[Site] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    dense: list[Site] = field(default_factory=list)  # marked for their padding alone
    skips: list[Skip] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    values: Values = field(default_factory=dict)  # set by find_regions
    counts: dict[str, int] = field(default_factory=dict)  # changes made, by pass
    unread: frozenset[fx.Node] = frozenset()  # nodes nobody read before any pass ran
    cuts_gradients: bool = False  # the model itself keeps some value's gradient from flowing back

    def __post_init__(self) -> None:
        self.unread = frozenset(node for node in self.gm.graph.nodes if not node.users)
        self.cuts_gradients = any(cuts_gradient(node) for node in self.gm.graph.nodes)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph


def kept_channels(channels: int, sparsity: float, multiple: int) -> int:
    """``k = max(1, floor(N * (1 - s)))`` rounded up to ``multiple``, never more than N (paper
    section 3; multiples of 16 keep a gathered row aligned)."""
    exact = max(1, int(channels * (1 - sparsity) + 1e-9))
    return min(channels, -(-exact // multiple) * multiple)


def is_trainable(node: fx.Node) -> bool:
    """Whether a placeholder holds a parameter that trains."""
    example = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(example, torch.Tensor) and example.requires_grad
