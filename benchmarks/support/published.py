"""The published SparseLoRA plans, the models they are for, and the batches they were reported on.

Sparsity per layer, rank 8 and the token policy are those of the YAML files (``configs/sparsity``)
that the authors of the paper (arXiv 2506.16500) publish with their reference implementation at
github.com/z-lab/sparselora; so are LoRA's rank and targets (its training defaults) and the batches
(its speed test: batch, length, output tokens). The paper's shares are those of its result tables,
read at full training length. No plan for instruction tuning (MT-Bench) is published: the code plan
of the same model stands in for it here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparselora_fx import SparsityPlan

RANK = 8
LORA_RANK = 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# transformers' LlamaConfig, as far as it decides shapes.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "Llama-2-13B": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    },
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip

# task -> (samples, length, output tokens)
BATCHES = {
    "Math10K": (8, 512, 128),
    "CSR": (8, 512, 3),
    "Code": (6, 1024, 512),
    "MT-Bench": (2, 2048, 512),
    "GLUE": (8, 128, 1),
    "ARC-AGI": (2, 2048, 512),
}

_SKIPPED_8B = (20, 24)  # layers whose attention stays dense in every plan with attention sparsity


@dataclass(frozen=True)
class Published:
    """One plan. ``ffn`` and ``attention`` map a sparsity to the layers that have it; ``paper`` is
    the paper's share of dense LoRA's FLOPs in percent; ``tokens`` as in `SparsityPlan`."""

    model: str
    task: str
    ffn: dict[float, tuple[int, ...]]
    attention: dict[float, tuple[int, ...]]
    paper: int | None = None
    tokens: str = "context"

    def levels(self) -> list[tuple[float, float]]:
        """``(ffn, attention)`` sparsity of each layer."""
        count = int(MODELS[self.model]["num_hidden_layers"])
        return [(_at(self.ffn, i), _at(self.attention, i)) for i in range(count)]

    def plan(self) -> SparsityPlan:
        """The plan as `sparselora_fx.compile` takes it, sparse from the first step."""
        return plan_of(self.levels(), self.tokens)


def plan_of(levels: Iterable[tuple[float, float]], tokens: str, multiple: int = 16) -> SparsityPlan:
    """A plan from the ``(ffn, attention)`` sparsity of each layer, sparse from the first step."""
    sparsity: dict[str, float] = {}
    for i, (ffn, attention) in enumerate(levels):
        sparsity[f"layers.{i}.mlp"] = ffn
        sparsity[f"layers.{i}.self_attn"] = attention
    return SparsityPlan(sparsity, tokens=tokens, start_step=0, channel_multiple=multiple, rank=RANK)


def _at(levels: dict[float, tuple[int, ...]], layer: int) -> float:
    return next((sparsity for sparsity, layers in levels.items() if layer in layers), 0.0)


def _layers(first: int, last: int, skipped: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(i for i in range(first, last + 1) if i not in skipped)


PLANS = (
    Published(
        "Llama-3-8B", "Math10K", {0.99: _layers(3, 30)}, {0.75: _layers(14, 29, _SKIPPED_8B)}, 46
    ),
    Published(
        "Llama-3-8B", "CSR", {0.97: _layers(17, 30)}, {0.2: _layers(17, 29, _SKIPPED_8B)}, 65
    ),
    Published(
        "Llama-3-8B", "GLUE", {0.95: _layers(17, 30), 0.5: (31,)}, {0.75: _layers(17, 29)}, 61,
        tokens="all",
    ),
    Published(
        "Llama-3-8B", "MT-Bench", {0.99: _layers(3, 30)}, {0.4: _layers(14, 29, _SKIPPED_8B)}, 53
    ),
    Published("Llama-3-8B", "Code", {0.99: _layers(3, 30)}, {0.4: _layers(14, 29, _SKIPPED_8B)}),
    Published("Llama-3-8B", "ARC-AGI", {0.9: _layers(16, 29)}, {}),
    Published("Llama-2-13B", "CSR", {0.97: _layers(13, 36)}, {0.2: _layers(17, 36)}, 61),
    Published("Llama-2-13B", "Math10K", {0.97: _layers(13, 36)}, {0.25: _layers(17, 36)}),
    Published("Llama-2-7B", "CSR", {0.9: _layers(13, 29)}, {0.5: _layers(17, 29, _SKIPPED_8B)}),
    Published("Llama-2-7B", "Math10K", {0.9: _layers(13, 29)}, {0.6: _layers(17, 29, _SKIPPED_8B)}),
    Published("Llama-2-7B", "Code", {0.99: _layers(3, 30)}, {0.25: _layers(14, 29, _SKIPPED_8B)}),
)  # fmt: skip
