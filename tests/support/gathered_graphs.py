"""Small graphs whose values are gathered: by a selection of channels, or by a list of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparselora_fx.ir.ops import OPS
from tests.support.small_graphs import Small, list_values

CONTEXT = torch.tensor([[True, True, False], [True, False, False]])
GIVEN = list_values("c", CONTEXT, 4) | list_values("o", ~CONTEXT, 5)  # what `Lists` stand for


class Selected(Small):
    """A graph with a selection ``s`` of 3 of 8 channels."""

    given: dict[str, Tensor] = {}  # noqa: RUF012 - read only

    def __init__(self) -> None:
        super().__init__()
        self.x = self.input("x", 2, 3, 8, trains=True)
        self.s = self.call(OPS.topk_channels.default, self.input("scores", 8), 3)

    def kept(self, width: int) -> fx.Node:
        """What a sliced linear might have returned."""
        return self.call("neg", self.input("c", 2, 3, width, trains=True))

    def gather(self, node: fx.Node, idx: fx.Node | None = None) -> fx.Node:
        return self.call(OPS.gather_channels.default, node, idx or self.s)

    def scatter(self, node: fx.Node, n: int = 8, idx: fx.Node | None = None) -> fx.Node:
        return self.call(OPS.scatter_channels.default, node, idx or self.s, n)

    def rows(self, *offsets: int, stride: int = 1) -> fx.Node:
        return self.call(OPS.channel_rows.default, self.s, 1, stride, list(offsets))


class Lists(Small):
    """A graph with the lists of context and of output tokens of ``x[2, 3, 8]``."""

    given = GIVEN

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.x = self.input("x", 2, 3, 8, trains=True)
        self.c, self.o = self.lists("c", 4, 2, 3), self.lists("o", outputs, 2, 3)

    def gather(self, node: fx.Node, lists: tuple[fx.Node, fx.Node] | None = None) -> fx.Node:
        return self.call(OPS.gather_tokens.default, node, *(lists or self.c))
