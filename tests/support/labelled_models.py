"""What tests share: labelled models."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle

SPARSE = {"layers.0.mlp": 0.75, "layers.0.self_attn": 0.5}
# transformers normalises and computes the loss in fp32 whatever the model's dtype: a few units in
# the last place. `Plain` below is fp64 throughout, and is held to 1e-9.
ROUNDING = 2e-6


def compare(
    model: Any, data: Any, plan: Any, bound: float = ROUNDING, backend: str = "eager"
) -> oracle.Step:
    """Trimmed and untrimmed steps agree to rounding; the trimmed one returns no logits."""
    steps = []
    for trim in (False, True):
        estimator = oracle.estimator_of(model)
        slx.compile(model, estimator, plan=plan, backend=backend, trim_logits=trim)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("default", module="torch|transformers|peft")
            steps.append(oracle.step(model, data))
        assert (model(**data).logits is None) == trim
        slx.restore(model)
    oracle.assert_close(steps[1], steps[0], bound)
    return steps[1]


class Block(nn.Module):
    """Attention and a gated feed-forward, with norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.RMSNorm(32), nn.RMSNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Plain(nn.Module):
    """A causal model in one dtype throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(oracle.VOCABULARY, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(32)
        self.head = nn.Linear(32, oracle.VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        target = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), target)
        return SimpleNamespace(loss=loss, logits=logits)


def plan_of(sparsity: Any, **options: Any) -> slx.SparsityPlan:
    return slx.SparsityPlan(sparsity, start_step=0, channel_multiple=1, **options)
