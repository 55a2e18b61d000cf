"""The models that `benchmarks.step_time` compares."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparselora_fx as slx
from benchmarks import reference
from benchmarks.presets import Preset
from benchmarks.published import LORA_TARGETS, RANK
from sparselora_fx.frozen import fingerprint_of, frozen_weights


def missing(preset: Preset) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    if preset.device != "cuda":
        return {"liger": "its kernels need an NVIDIA GPU"}
    if importlib.util.find_spec("liger_kernel") is None:
        return {"liger": "liger-kernel is not installed"}
    return {}


def dense(preset: Preset, weights: nn.Module | None = None) -> nn.Module:
    """PEFT LoRA on random weights; with ``weights``, on those of another model."""
    if weights is not None:
        shared = {id(p): p for p in weights.parameters() if not p.requires_grad}
        return copy.deepcopy(weights, shared)
    torch.manual_seed(0)
    with torch.device(preset.device):
        base = LlamaForCausalLM(LlamaConfig(**preset.shape)).to(preset.dtype)
    rank = preset.lora_rank
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config).train()


def random_estimator(model: nn.Module) -> slx.SVDEstimator:
    """Random factors of the right shapes: an SVD of random weights would take minutes and choose
    channels that are just as random."""
    frozen = frozen_weights(model)
    factors: dict[str, Any] = {}
    for w in frozen:
        a = torch.randn(w.out_features, RANK, dtype=torch.float32).to(w.weight.dtype)
        factors[w.canonical] = (a, torch.randn(RANK, w.in_features).to(w.weight.dtype))
    prints = {w.canonical: fingerprint_of(w.logical()) for w in frozen}
    return slx.SVDEstimator(factors, prints, complete=True)


def build(preset: Preset) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every peer that can run here, and why the others cannot.

    Ours have frozen weights of their own, because they may lay them out otherwise; the dense ones
    share theirs.
    """
    absent = missing(preset)
    eager = dense(preset)
    estimator = random_estimator(eager)
    built = {"peft": eager}
    compiled = built["peft+compile"] = dense(preset, eager)
    compiled.__dict__["forward"] = torch.compile(compiled.forward)
    if "liger" not in absent:
        built["liger"] = _liger(dense(preset, eager))
    for name, cut in (("reference", False), ("reference-cut", True)):
        built[name] = dense(preset, eager)
        reference.apply(built[name], estimator.factors, preset.levels(), cut_gradients=cut)
    ours = dense(preset)
    trimmed = dense(preset, ours)
    built["sparselora_fx"] = slx.compile(ours, estimator, plan=preset.plan())
    built["sparselora_fx-trim"] = slx.compile(
        trimmed, estimator, plan=preset.plan(), trim_logits=True
    )
    return built, absent


def _liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model.get_base_model())  # type: ignore[operator]
    return model
