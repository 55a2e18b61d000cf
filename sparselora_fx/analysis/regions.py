"""The vocabulary that passes share: sites, regions, skips, what is observed. It holds what analyses
found; it finds nothing itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx

from sparselora_fx.graph.layout import Atom, ChannelMap, merge_atoms, split_atoms

if TYPE_CHECKING:
    from sparselora_fx.analysis.row_kinds import TokenRows
from sparselora_fx.ir.markers import MarkedTokens, SiteSpec, TokenList

# How rows stand to the batch's tokens: as those do, tokens before samples, reversed or picked, of
# something else than the batch's tokens, or as no way back to the batch says (`token_order`).
IN_ORDER, SWAPPED, MOVED, UNKNOWN = "in order", "swapped", "moved", "unknown"
FOREIGN = "foreign"


@dataclass(eq=False)
class Site:
    """One frozen linear in a graph: ``linear(x[..., K], weight[N, K], bias) -> node[..., N]``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node  # the placeholder, as stored
    transposed: bool  # stored [K, N]
    bias: fx.Node | None
    factors: tuple[fx.Node, fx.Node]
    tokens: MarkedTokens[fx.Node]
    spec: SiteSpec
    out_features: int
    in_features: int
    padding_unread: bool = False  # whether no row of padding in what it returns reaches a loss
    token_rows: TokenRows | None = None  # which tokens they are, if not the batch's one by one
    order: str = UNKNOWN  # how the rows of x stand to the batch's tokens (`token_order`)
    statistics: dict[str, fx.Node] = field(default_factory=dict)  # what `SiteSpec.statistics` names
    adapter_adds: dict[fx.Node, fx.Node] = field(
        default_factory=dict
    )  # addition -> the LoRA branch it adds
    bias_adds: set[fx.Node] = field(default_factory=set)  # additions of a bias outside the linear
    more: dict[fx.Node, fx.Node] = field(default_factory=dict)  # further products: their inputs
    scaling: set[fx.Node] = field(default_factory=set)  # nodes that scale its rows, with the weight
    adapter_nodes: set[fx.Node] = field(default_factory=set)  # every node of the LoRA branches
    adapter_weights: set[fx.Node] = field(default_factory=set)  # trained matrices they read

    @property
    def token_weight(self) -> fx.Node | None:
        """The tokens that count in scores, or None: all."""
        return self.tokens.counted

    @property
    def split(self) -> tuple[TokenList[fx.Node], TokenList[fx.Node]] | None:
        """The lists of context tokens and of dense tokens, or None: every token is sparse. Dense
        are output tokens and, unless nobody reads it, padding."""
        sparse, dense = self.tokens.sparse, self.tokens.dense
        if not self.padding_unread:
            dense = self.tokens.others or dense
        return None if sparse is None or dense is None else (sparse, dense)

    @property
    def unpadded(self) -> TokenList[fx.Node] | None:
        """The list of all tokens but padding, or None: there is none, or it is read."""
        return self.tokens.real if self.padding_unread else None


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
class RowSelection:
    """Rows of one producer (or columns of the consumer) that a channel selects: one `ChannelMap`
    per offset."""

    site: Site
    maps: tuple[ChannelMap, ...]
    scored: bool = True  # whether its norms say how much a channel matters (a gate's do not)

    @property
    def offsets(self) -> list[int]:
        return [m.offset for m in self.maps]


@dataclass(eq=False)
class ChannelChoice:
    """One channel choice of a region: how many channels there are, how many are kept, and the rows
    it selects."""

    name: str  # "ffn", "qk", "v", or "rest..." for rows that are always kept
    channels: int
    kept: int
    producers: list[RowSelection]
    selection: fx.Node | None = None  # int64[kept], set by insert_predictor
    whole: bool = False  # rows that no choice may drop: every channel is kept


@dataclass(eq=False)
class Region:
    """Sites that share channel choices: an FFN (one choice) or an attention (choices "qk" and
    "v")."""

    kind: str  # "ffn" or "attention"
    choices: list[ChannelChoice]
    # Columns selected by the last choice: of one consumer, or of several that read one hidden
    # state.
    consumed: list[RowSelection]
    attention: Attention | None = None
    rows: dict[Site, fx.Node] = field(default_factory=dict)  # set by slice_sites

    @property
    def producers(self) -> list[Site]:
        """The sites whose outputs are chosen."""
        picks = [pick for choice in self.choices for pick in choice.producers]
        return list(dict.fromkeys(pick.site for pick in picks))

    @property
    def consumers(self) -> list[Site]:
        """The sites whose inputs are chosen."""
        return [pick.site for pick in self.consumed]

    @property
    def sites(self) -> list[Site]:
        return [*self.producers, *self.consumers]


@dataclass(frozen=True, eq=False)
class Skip:
    """A frozen weight that stays dense, and why."""

    weight: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Observed:
    """Rows of what some frozen weights read, to calibrate on. ``taken`` are the rows' indices
    where only the graph knows them; ``kn``: which weights are stored [K, N] (None: not known)."""

    weights: tuple[fx.Node, ...]  # placeholders, in the order of the forward
    kn: tuple[bool | None, ...]
    rows: fx.Node
    taken: fx.Node | None

    @property
    def tensors(self) -> list[fx.Node]:
        return [self.rows] if self.taken is None else [self.rows, self.taken]


def kept_channels(channels: int, sparsity: float, multiple: int) -> int:
    """``k = max(1, floor(N * (1 - s)))`` rounded up to ``multiple``, never more than N (paper
    section 3; multiples of 16 keep a gathered row aligned)."""
    exact = max(1, int(channels * (1 - sparsity) + 1e-9))
    return min(channels, -(-exact // multiple) * multiple)


def is_trainable(node: fx.Node) -> bool:
    """Whether a placeholder holds a parameter that trains."""
    example = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(example, torch.Tensor) and example.requires_grad
