"""What markers say of a site: its sparsity, as a string."""

from __future__ import annotations

from dataclasses import dataclass

OBSERVED = "observed"  # the spec of a site that is dense now, and whose input is observed


@dataclass(frozen=True)
class SiteSpec:
    """The plan's words for one site, carried through the graph as a string (strings are guarded,
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


# The words of a weight that stays dense. Its marker, if there is one, is about padding.
DENSE = SiteSpec(0.0, 0.0).encode()
PADDED = 9  # tensors that a marker carries in a batch with padding (`token_lists.Tokens.tensors`)
# What a marker carries in place of the plan's words where gradients are off inside a call that
# began with them.
WITHOUT_GRADIENTS = "without gradients"
