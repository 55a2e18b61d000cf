"""What markers say of a site: its sparsity, as a string, and the batch's tokens, as lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")  # a tensor, or the node that stands for it in a graph

OBSERVED = "observed"  # the spec of a site that is dense now, and whose input is observed


@dataclass(frozen=True)
class SiteSpec:
    """What the plan says of one site, carried through the graph as a string (strings are guarded,
    never traced)."""

    ffn: float
    attention: float
    statistics: tuple[str, ...] = ()  # names of the vectors that the marker carries besides factors
    kn: bool = False  # its factors take the weight to be stored [K, N], as in a Conv1D

    def encode(self) -> str:
        """A string that `decode` reads back exactly."""
        stored = "kn" if self.kn else "nk"
        return ",".join([repr(self.ffn), repr(self.attention), stored, *self.statistics])

    @staticmethod
    def decode(text: str) -> SiteSpec:
        """Inverse of `encode`."""
        ffn, attention, stored, *statistics = text.split(",")
        return SiteSpec(float(ffn), float(attention), tuple(statistics), stored == "kn")


# The spec of a weight that stays dense. Its marker, if there is one, is about padding.
DENSE = SiteSpec(0.0, 0.0).encode()
# What a marker carries in place of the plan's spec where gradients are off inside a call that
# began with them.
WITHOUT_GRADIENTS = "without gradients"


class TokenList(NamedTuple, Generic[T]):
    """``idx``: the flat indices ``int64[P]`` of some tokens of the batch, padded with -1; ``pos``:
    their inverse ``int64[B, L]``, -1 where a token is not in the list."""

    idx: T
    pos: T


@dataclass(frozen=True)
class MarkedTokens(Generic[T]):
    """What a marker carries of a batch's tokens, as one sequence of tensors in the graph.

    Attributes:
        counted: ``bool[B, L]``, the tokens that count in scores; None: all rows do.
        sparse, dense: if the tokens are split, the list of each part.
        real, others: if there is padding to tell from them, the tokens that are none, and all that
            are not sparse.
    """

    counted: T | None = None
    sparse: TokenList[T] | None = None
    dense: TokenList[T] | None = None
    real: TokenList[T] | None = None
    others: TokenList[T] | None = None

    def encode(self) -> list[T]:
        """A sequence that `decode` reads back: of 0, 1, 5 or 9 tensors."""
        lists = (self.sparse, self.dense, self.real, self.others)
        found = [] if self.counted is None else [self.counted]
        return found + [tensor for pair in lists if pair is not None for tensor in pair]

    @staticmethod
    def decode(carried: Sequence[T]) -> MarkedTokens[T]:
        """Inverse of `encode`."""
        if not carried:
            return MarkedTokens()
        counted, *rest = carried
        pairs = zip(rest[::2], rest[1::2], strict=True)
        return MarkedTokens(counted, *(TokenList(idx, pos) for idx, pos in pairs))
