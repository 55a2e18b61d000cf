"""The models that `benchmarks.step_time` and `benchmarks.gpu_suite` compare."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparselora_fx as slx
from benchmarks.support import reference
from benchmarks.support.presets import Preset
from benchmarks.support.published import LORA_TARGETS, RANK
from sparselora_fx.environment import DISABLED_LAYERS
from sparselora_fx.model.frozen_weights import fingerprint_of, frozen_weights

OPTIONS = ("trim", "whole", "apart", "cudagraphs", "verify")  # of ours: "ours+trim+cudagraphs"


def missing(preset: Preset) -> dict[str, str]:
    """Peers of `build` that cannot run here, and why."""
    found = {"liger": why_not("liger", preset.device)}
    if preset.quantised:
        reason = "it slices plain matrices only"
        found |= {"reference": reason, "reference-cut": reason}
    return {name: reason for name, reason in found.items() if reason is not None}


def why_not(name: str, device: str) -> str | None:
    """Why a peer cannot run on a device here; None: it can."""
    base, *options = name.split("+")
    if base == "liger" and device != "cuda":
        return "its kernels need an NVIDIA GPU"
    if base == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if base == "fp8" and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if base in ("peft", "fp8") and "cudagraphs" in options and device != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    wanted = {"cudagraphs": "cuda_graphs", "verify": "verify_speed"}
    for option in options if base == "ours" else ():
        if option in wanted and not takes(wanted[option]):
            return f"slx.compile has no option {wanted[option]}"
    return None


def takes(option: str) -> bool:
    """Whether `slx.compile` has an option of this name."""
    return option in inspect.signature(slx.compile).parameters


def dense(preset: Preset, weights: nn.Module | None = None) -> nn.Module:
    """PEFT LoRA on random weights; with ``weights``, on those of another model."""
    if weights is not None:
        shared = {id(p): p for p in weights.parameters() if not p.requires_grad}
        return copy.deepcopy(weights, shared)
    torch.manual_seed(0)
    with torch.device(preset.device):
        base = LlamaForCausalLM(LlamaConfig(**preset.shape)).to(preset.dtype)
    if preset.quantised:
        to_four_bits(base, preset.quantised)
    rank = preset.lora_rank
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config).train()


def to_four_bits(base: nn.Module, kind: str) -> None:
    """Let bitsandbytes quantise the linears of the blocks, as transformers does on loading."""
    import bitsandbytes as bnb

    for name, linear in list(base.named_modules()):
        if isinstance(linear, nn.Linear) and "layers." in name:
            made = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=linear.weight.dtype,
                quant_type=kind,
            )
            made.weight = bnb.nn.Params4bit(
                linear.weight.detach(), quant_type=kind, compress_statistics=False, module=made
            )
            owner, _, last = name.rpartition(".")
            setattr(base.get_submodule(owner), last, made.to(linear.weight.device))


def random_estimator(model: nn.Module) -> slx.SVDEstimator:
    """Random factors of the right shapes: an SVD of random weights would take minutes and choose
    channels that are just as random."""
    frozen = frozen_weights(model)
    factors: dict[str, Any] = {}
    for w in frozen:
        a = torch.randn(w.out_features, RANK, dtype=torch.float32).to(w.dtype)
        factors[w.canonical] = (a, torch.randn(RANK, w.in_features).to(w.dtype))
    prints = {w.canonical: fingerprint_of(w.logical()) for w in frozen}
    return slx.SVDEstimator(factors, prints, complete=True)


class Family:
    """Builds the peers of a preset, each with adapters of its own.

    Ours have frozen weights of their own, because they may lay them out otherwise; the dense ones
    share theirs. Names: ``peft``, ``peft+compile``, ``fp8+compile`` (the frozen matmuls in fp8),
    both also with ``+cudagraphs``; ``liger``, ``reference``, ``reference-cut``; and ``ours`` with
    any of `OPTIONS`: ``trim`` (`trim_logits`), ``whole`` (no pieces), ``cudagraphs``
    (``cuda_graphs=True``), ``verify`` (``verify_speed=True``, which may leave it dense).
    """

    def __init__(self, preset: Preset, backend: str = "inductor") -> None:
        self.preset, self.backend = preset, backend
        self._frozen: dict[bool, nn.Module] = {}  # by whether it is ours: never compiled itself
        self._estimator: slx.SVDEstimator | None = None

    def make(self, name: str) -> nn.Module:
        """A peer, not yet compiled by a step. `why_not` says which names can be made here."""
        base, *options = name.split("+")
        model = self._model(base == "ours")
        if base == "ours":
            return self._ours(model, options)
        if base == "liger":
            return _liger(model)
        if base == "fp8":
            _to_fp8(model)
        if base.startswith("reference"):
            factors = self.estimator(model).factors
            cut = base == "reference-cut"
            reference.apply(model, factors, self.preset.levels(), cut_gradients=cut)
        if "compile" in options:
            graphs = {"triton.cudagraphs": True} if "cudagraphs" in options else None
            compiled = torch.compile(model.forward, backend=self.backend, options=graphs)
            model.__dict__["forward"] = compiled
        return model

    def estimator(self, model: nn.Module) -> slx.SVDEstimator:
        """Random factors, the same for all."""
        if self._estimator is None:
            self._estimator = random_estimator(model)
        return self._estimator

    def _model(self, ours: bool) -> nn.Module:
        if ours not in self._frozen:
            self._frozen[ours] = dense(self.preset)
        return dense(self.preset, self._frozen[ours])

    def _ours(self, model: nn.Module, options: list[str]) -> nn.Module:
        arguments: dict[str, Any] = {"trim_logits": "trim" in options}
        if takes("verify_speed"):  # else a sparse step that is slower would be timed as a dense one
            arguments["verify_speed"] = "verify" in options
        if "cudagraphs" in options:
            arguments["cuda_graphs"] = True
        estimator = self.estimator(model)
        plan = self.preset.plan()
        model = slx.compile(model, estimator, plan=plan, backend=self.backend, **arguments)
        off = {"whole": "pieces", "apart": "shared_launches"}
        layers = [layer for option, layer in off.items() if option in options]
        if layers:
            model.__dict__["forward"] = _without(layers, model.forward)
        return model


def _without(layers: list[str], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward whose first calls compile it without some layers of the stack."""

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        with patch.dict(os.environ, {DISABLED_LAYERS: ",".join(layers)}):
            return forward(*args, **kwargs)

    return called


def build(preset: Preset, backend: str = "inductor") -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every peer of `benchmarks.step_time` that can run here, and why the others
    cannot."""
    absent = missing(preset)
    family = Family(preset, backend)
    names = ("peft", "peft+compile", "liger", "reference", "reference-cut")
    built = {name: family.make(name) for name in names if name not in absent}
    built["sparselora_fx"] = family.make("ours")
    built["sparselora_fx-trim"] = family.make("ours+trim")
    return built, absent


def _to_fp8(model: nn.Module) -> None:
    """Compute the frozen matmuls of the blocks in fp8, scaled by tensor."""
    from torchao.float8 import convert_to_float8_training

    def frozen(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear) and not module.weight.requires_grad
        return linear and "layers." in name

    convert_to_float8_training(model, module_filter_fn=frozen)


def _liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model.get_base_model())  # type: ignore[operator]
    return model
