"""What `benchmarks.gpu_suite` times: some blocks of a model in place of all, in its
proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.support.presets import PRESETS, Level, Preset
from benchmarks.support.published import BATCHES, LORA_RANK, MODELS, PLANS

LLAMA_8B, LLAMA_13B = "Llama-3-8B", "Llama-2-13B"
# A plan of ours for Math10K that leaves 37 % of the dense FLOPs: feed-forward blocks at 0.99 and
# attention at 0.75 wherever the model allows.
LEVELS_37 = tuple((0.99, 0.75 if layer > 2 else 0.0) for layer in range(32))


def thinned(levels: Sequence[Level], count: int) -> tuple[Level, ...]:
    """``count`` of a model's layers, evenly spaced, with a mean sparsity close to that of all."""
    apart = len(levels) // count
    mean = [sum(part) / len(levels) for part in zip(*levels, strict=True)]

    def distance(chosen: Sequence[Level]) -> float:
        means = [sum(part) / count for part in zip(*chosen, strict=True)]
        return sum(abs(a - b) for a, b in zip(means, mean, strict=True))

    return tuple(min((levels[i::apart][:count] for i in range(apart)), key=distance))


def shortened(preset: Preset, layers: int) -> Preset:
    """A preset with fewer layers, and a vocabulary that keeps the head's share of the work."""
    whole = int(preset.shape["num_hidden_layers"])
    if layers >= whole:
        return preset
    vocabulary = int(preset.shape["vocab_size"]) * layers // whole // 16 * 16
    shape = {**preset.shape, "num_hidden_layers": layers, "vocab_size": vocabulary}
    stack = thinned(preset.levels(), layers)
    return replace(preset, shape=shape, stack=stack)


def _published(name: str, model: str, task: str) -> Preset:
    plan = next(p for p in PLANS if (p.model, p.task) == (model, task))
    shape, batch, stack = MODELS[model], BATCHES[task], tuple(plan.levels())
    return Preset(name, shape, batch, stack, "cuda", torch.bfloat16, LORA_RANK, model)


# The order is that of importance: what time does not allow is left out from the end.
SUITE = {
    preset.name: preset
    for preset in (
        _published("8b-math10k", LLAMA_8B, "Math10K"),
        replace(PRESETS["llama32-1b"], name="1b-default"),
        _published("8b-csr", LLAMA_8B, "CSR"),
        replace(_published("8b-37", LLAMA_8B, "Math10K"), stack=LEVELS_37),
        _published("8b-code", LLAMA_8B, "Code"),
        _published("8b-instruction", LLAMA_8B, "MT-Bench"),
        _published("13b-math10k", LLAMA_13B, "Math10K"),
    )
}
LAYERS = {"8b-math10k": 8, "1b-default": 16}  # of the others: 4


def preset_of(name: str, layers: int | None = None, *, tiny: bool = False) -> Preset:
    """A preset of the suite: so many layers, or the number that it is usually timed with. Tiny: its
    plan on a toy of so many layers, or two, in bf16 on a CPU."""
    if not tiny:
        return shortened(SUITE[name], layers or LAYERS.get(name, 4))
    short = shortened(SUITE[name], layers or 2)
    shape = {**PRESETS["tiny"].shape, "num_hidden_layers": layers or 2}
    return replace(short, shape=shape, batch=(2, 24, 6), device="cpu", lora_rank=4)


def matmul_parameters(preset: Preset) -> int:
    """Parameters that every token is multiplied by: the frozen linears and the head."""
    shape = preset.shape
    hidden, wide = int(shape["hidden_size"]), int(shape["intermediate_size"])
    kv = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * wide
    return int(shape["num_hidden_layers"]) * layer + hidden * int(shape["vocab_size"])


def flop_share(preset: Preset, *, trim: bool = False) -> float:
    """Sparse over dense FLOPs of the matmuls of a step: frozen linears, head, attention products.

    By formula; adapters and the choice of channels (about 1 %) are not in it.
    `benchmarks.flops` counts the rewritten graphs.
    """
    shape, (_, length, outputs) = preset.shape, preset.batch
    hidden, wide = int(shape["hidden_size"]), int(shape["intermediate_size"])
    kv = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    context = 1 - outputs / length
    head = hidden * int(shape["vocab_size"])
    products = 3 * length * hidden / 2  # two products forward, four backward, in units of 4 N
    ffn, attention = 3 * hidden * wide, 2 * hidden * (hidden + kv)
    dense = sparse = 0.0
    for skipped, skipped_attention in preset.levels():
        dense += ffn + attention + products
        sparse += ffn * (1 - context * skipped) + products
        sparse += attention * (1 - context * skipped_attention)
    return (sparse + head * (1 - context if trim else 1)) / (dense + head)
