"""What `benchmarks.step_time` times: model shapes, plans and batches.

GPU presets have the paper's batches: (samples, length, output tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.graphs import llama
from benchmarks.support.published import BATCHES, LORA_RANK, MODELS, PLANS, Published, plan_of
from sparselora_fx import SparsityPlan
from sparselora_fx.model.frozen_weights import frozen_weights

Level = tuple[float, float]


@dataclass(frozen=True)
class Preset:
    """One measurement. ``stack`` is the ``(ffn, attention)`` sparsity of each layer; None: the
    default plan's."""

    name: str
    shape: dict[str, Any]
    batch: tuple[int, int, int]
    stack: tuple[Level, ...] | None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    lora_rank: int = 8
    published: str = ""  # the model whose published plans the preset can take
    quantised: str = ""  # how the base is stored: "nf4" (bitsandbytes)

    @property
    def autocast(self) -> torch.dtype | None:
        """What steps run in under autocast: the dtype of a base that is not in fp32."""
        return None if self.dtype == torch.float32 else self.dtype

    def levels(self) -> list[Level]:
        """``(ffn, attention)`` sparsity of each layer."""
        if self.stack is not None:
            return list(self.stack)
        layers = int(self.shape["num_hidden_layers"])
        model = llama(self.shape, layers)
        frozen = frozen_weights(model)
        known = SparsityPlan.default().resolve(frozen, [n for n, _ in model.named_modules()])
        found = {}
        for weight in frozen:
            parts = weight.canonical.split(".")
            if "layers" in parts:
                found[int(parts[parts.index("layers") + 1])] = known[weight.name]
        return [(found[i].ffn, found[i].attention) for i in range(layers)]

    def plan(self) -> SparsityPlan:
        """The plan, sparse from the first step."""
        return plan_of(self.levels(), "context")

    def batches(self, count: int = 4) -> list[dict[str, Tensor]]:
        """Random token ids; the last tokens of each sample carry loss."""
        samples, length, outputs = self.batch
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(count):
            size = (samples, length)
            ids = torch.randint(0, int(self.shape["vocab_size"]), size, generator=generator)
            labels = ids.clone()
            labels[:, : length - outputs] = -100
            made.append({"input_ids": ids.to(self.device), "labels": labels.to(self.device)})
        return made

    def for_task(self, task: str | None) -> Preset:
        """The preset with the published plan and batch of another task of its model."""
        if task is None:
            return self
        plan = next((p for p in PLANS if (p.model, p.task) == (self.published, task)), None)
        if plan is None:
            allowed = [p.task for p in PLANS if p.model == self.published]
            raise SystemExit(f"{self.name} has no plan for {task!r}; allowed: {allowed}")
        return replace(self, batch=BATCHES[task], stack=tuple(plan.levels()))


def _published(name: str, model: str, task: str) -> Preset:
    plan: Published = next(p for p in PLANS if (p.model, p.task) == (model, task))
    stack = tuple(plan.levels())
    return Preset(
        name, MODELS[model], BATCHES[task], stack, "cuda", torch.bfloat16, LORA_RANK, model
    )


def _shape(hidden: int, wide: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
    }  # fmt: skip


_SPARSE = (0.95, 0.5)
_MIDDLE = ((0.0, 0.0), *(_SPARSE,) * 4, (0.0, 0.0))
_DEEPER = ((0.0, 0.0), *(_SPARSE,) * 6, (0.0, 0.0))

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny", _shape(64, 160, 2, 4, 2, 128), (2, 24, 6), ((0, 0), (0.9, 0.5))
        ),
        Preset("cpu-small", _shape(512, 2048, 6, 8, 4, 4096), (4, 256, 64), _MIDDLE),
        Preset(
            "cpu-small-nf4", _shape(512, 2048, 6, 8, 4, 4096), (4, 256, 64), _MIDDLE,
            quantised="nf4",
        ),
        Preset("cpu-medium", _shape(1024, 4096, 8, 16, 8, 8192), (4, 512, 128), _DEEPER),
        Preset(
            "llama32-1b", _shape(2048, 8192, 16, 32, 8, 128256), BATCHES["Math10K"], None, "cuda",
            torch.bfloat16, LORA_RANK,
        ),
        _published("llama3-8b", "Llama-3-8B", "Math10K"),
        _published("llama2-13b", "Llama-2-13B", "Math10K"),
    )
}  # fmt: skip
