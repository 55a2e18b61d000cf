"""Quantisers that the tests do not need, where they are installed: compressed-tensors, quanto,
GPTQ and AWQ of gptqmodel. What cannot be sliced is refused, or stays dense, by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig

import sparselora_fx as slx
from tests.support import oracle
from tests.support.quantised_models import dequantised, saved_llama

PLAN = {"mlp": 0.5, "self_attn": 0.5}
GROUP = 32  # input channels that share a scale, of GPTQ and AWQ


def adapted(base: Any, targets: Any = "all-linear") -> Any:
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets)).train()


def compressed(folder: Path, scheme: str) -> None:
    """A random Llama as compressed-tensors stores it, with scales of ones."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    saved_llama(folder, hidden=128, width=256)
    model = LlamaForCausalLM.from_pretrained(folder)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "INT8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_compressed_tensors(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("compressed_tensors")
    compressed(tmp_path, scheme)
    config = CompressedTensorsConfig(dequantize=True)
    plain = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config
    )
    model, data = adapted(plain), oracle.batch()
    twin = dequantised(model)
    got = oracle.run_compiled(model, data, oracle.plan_of(PLAN), "eager", restore=False)
    oracle.assert_close(got, oracle.reference_step(twin, data, got.record), 2e-5)
    words = r"quantised by compressed-tensors.*dequantize=True \(CompressedTensorsConfig"
    stored = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for _ in range(2):  # as stored, and unpacked in place by a first call
        stored.requires_grad_(False)
        with pytest.raises(slx.CompileError, match=words):
            slx.compile(stored, plan=PLAN)
        with torch.no_grad():
            stored(**data)


def packed(folder: Path, method: str) -> Any:
    """A random Llama as GPTQ or AWQ stores it in 4 bits."""
    config = saved_llama(folder)
    state: dict[str, Tensor] = {}

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)

    for name, value in LlamaForCausalLM(config).state_dict().items():
        if "_proj" not in name:
            state[name] = value.clone()
            continue
        (n, k), own = value.shape, name.removesuffix("weight")
        state[f"{own}qweight"] = words(k // 8, n) if method == "gptq" else words(k, n // 8)
        state[f"{own}qzeros"] = words(k // GROUP, n // 8)
        state[f"{own}scales"] = torch.rand(k // GROUP, n).mul(0.005).half()
        if method == "gptq":
            state[f"{own}g_idx"] = (torch.arange(k) // GROUP).int()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    told = {
        "quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
        "zero_point": True, "version": "gemm", "checkpoint_format": "gptq" if method == "gptq"
        else "gemm",
    }  # fmt: skip
    text = json.dumps({**config.to_dict(), "quantization_config": told})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def quanto(folder: Path) -> Any:
    saved_llama(folder)
    config = QuantoConfig(weights="int8")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("package", "method", "kind"),
    [
        ("optimum.quanto", "quanto", "optimum (WeightQBytesTensor)"),
        ("gptqmodel", "gptq", "gptqmodel (Torch"),
        ("gptqmodel", "awq", "gptqmodel (Torch"),
    ],
)
def test_dense_by_name(tmp_path: Path, package: str, method: str, kind: str) -> None:
    pytest.importorskip(package)
    base = quanto(tmp_path) if method == "quanto" else packed(tmp_path, method)
    shape: LlamaConfig = base.config
    for name in ("gate_proj", "up_proj", "down_proj"):
        k, n = shape.hidden_size, shape.intermediate_size
        k, n = (n, k) if name == "down_proj" else (k, n)
        setattr(base.model.layers[0].mlp, name, nn.Linear(k, n, bias=False).requires_grad_(False))
    model = adapted(base, ["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match="4 of 7 frozen linears are quantised by"):
        slx.compile(model, plan=oracle.plan_of({"mlp": 0.5}), backend="eager")
    with slx.record(model) as record:
        oracle.step(model, oracle.batch())
    assert len(record.sites) == 3
    assert slx.explain(model, verbose=True).count(f"dense: quantised by {kind}") == 4
