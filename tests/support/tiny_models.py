"""A language model that compiles in a fraction of a second: feed-forwards alone, LoRA on all."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import VOCABULARY


class Output(NamedTuple):
    """What models of transformers return, as far as tests read it."""

    loss: Tensor | None
    logits: Tensor


class Adapted(nn.Module):
    """A frozen linear with LoRA of rank 2 and dropout before it."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, inputs) * 0.2)
        self.B = nn.Parameter(torch.randn(outputs, 2) * 0.2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(self.dropout(x), self.A), self.B)


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.gate = Adapted(hidden, channels, dropout)
        self.up = Adapted(hidden, channels, dropout)
        self.down = Adapted(channels, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    def __init__(self, hidden: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden).requires_grad_(False)
        self.mlp = FeedForward(hidden, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(x))
        return x + y


class TinyModel(nn.Module):
    """Blocks between an embedding and its transpose; labels are shifted, as in transformers."""

    def __init__(self, layers: int, hidden: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden).requires_grad_(False)
        self.layers = nn.ModuleList(Block(hidden, channels, dropout) for _ in range(layers))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Output:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = x @ self.embedding.weight.T
        if labels is None:
            return Output(None, logits)
        predicted = logits[:, :-1].flatten(0, 1)
        return Output(F.cross_entropy(predicted, labels[:, 1:].flatten()), logits)


def tiny(
    layers: int = 1, *, dropout: float = 0.0, hidden: int = 16, channels: int = 40
) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return TinyModel(layers, hidden, channels, dropout).train()
