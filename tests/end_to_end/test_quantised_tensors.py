"""LoRA on weights that torchao or transformers keep an element a byte: sliced equals
masked-dense over the dequantised weights, in fp64."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from transformers import LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import sparselora_fx as slx
from tests.support import oracle
from tests.support.quantised_models import dequantised, saved_llama

PLAN = {"mlp": 0.75, "self_attn": 0.5}
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
CONFIGS = [
    pytest.param(Int8WeightOnlyConfig(set_inductor_config=False), "Int8Tensor", id="int8"),
    pytest.param(
        Float8WeightOnlyConfig(set_inductor_config=False),
        "Float8Tensor",
        id="float8",
        marks=pytest.mark.slow,
    ),
    pytest.param(INT4, "IntxUnpackedToInt8Tensor", id="int4"),
]


def quantised(folder: Path, config: Any) -> nn.Module:
    saved_llama(folder, bias=True)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_(base, config, lambda m, name: isinstance(m, nn.Linear) and "layers" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: that merging needs transformers' loader
        model = get_peft_model(base, oracle.lora_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train()


@pytest.mark.parametrize(("config", "kind"), CONFIGS)
def test_torchao_equals_masked_dense(tmp_path: Path, config: Any, kind: str) -> None:
    model, data = quantised(tmp_path, config), oracle.batch()
    plain, before = dequantised(model), oracle.marks(model)
    backend = "aot_eager" if kind == "Int8Tensor" else "eager"
    got = oracle.run_compiled(model, data, oracle.plan_of(PLAN), backend, restore=False)
    oracle.assert_rewrote(got.record, plain, PLAN)
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 2e-5)
    assert slx.explain(model, verbose=True).count(f"unpacked from torchao {kind}") == 7
    slx.restore(model)
    assert oracle.marks(model) == before


def test_quantised_activations_are_not_understood(tmp_path: Path) -> None:
    model = quantised(tmp_path, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(slx.CompileError, match=r"quantised by torchao \(Int8Tensor\)"):
        slx.compile(model, plan=PLAN)


class Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 40)
        self.first = nn.Linear(40, 40)
        self.up, self.down = kind(40, 72), kind(72, 40)
        for frozen in (self.embed, self.up, self.down):
            frozen.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.first(self.embed(input_ids))
        return SimpleNamespace(loss=self.down(F.silu(self.up(x))).square().mean())


@pytest.mark.parametrize("block", [(16, 32), None], ids=["tiles", "one scale"])
def test_fp8_checkpoints_equal_masked_dense(block: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model = Net(lambda k, n: FP8Linear(k, n, block_size=block)).train()
    plain = Net(nn.Linear).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "scale" not in k}, False)
    with torch.no_grad():
        for name in ("up", "down"):
            linear: Any = model.get_submodule(name)
            values = torch.randn(linear.out_features, linear.in_features)
            linear.weight.data = values.to(torch.float8_e4m3fn)
            linear.weight_scale_inv.data.uniform_(0.05, 0.2)
            scales = linear.weight_scale_inv.double()
            if block is not None:
                spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                scales = spread[: values.shape[0], : values.shape[1]]
            twin = plain.get_submodule(name)
            twin.weight.copy_(linear.weight.double() * scales)
            twin.bias = None
    data = {"input_ids": torch.randint(0, 11, (2, 9))}
    got = oracle.run_compiled(model, data, oracle.plan_of(0.5), restore=False)
    assert set(got.record.sites) == {"up", "down"}
    with oracle.masked_reference(plain, got.record):
        expected = oracle.step(plain, data)
    oracle.assert_close(got, expected, 2e-5)
    assert slx.explain(model, verbose=True).count("unpacked from transformers fp8") == 2
