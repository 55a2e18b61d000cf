"""A PEFT model through `sparselora_fx.compile`: passes, lowering and kernels against eager."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.lowering import inductor_backend
from tests.support.offgpu_backend import FakeGPU

pytestmark = [pytest.mark.offgpu, pytest.mark.slow]


def build() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def gradients(model: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """Loss and adapter gradients of one training step at half the channels."""
    estimator = slx.SVDEstimator.build(model, rank=4)
    plan = slx.SparsityPlan(0.5, **options)
    model = slx.compile(model, estimator, plan=plan, backend="inductor")
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 19))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(
    ("choice", "score", "kernels"),
    [("template", "strided+weighted", 13), ("fallback", "pooled", 10)],
)
def test_step_of_a_compiled_model(
    choice: str, score: str, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGPU(choice=choice)

    def fake(name: str, gm: Any, inputs: Any, *, rewritten: bool) -> Any:
        return gpu(gm, inputs) if rewritten else gm.forward

    def eager(name: str, gm: Any, inputs: Any, *, rewritten: bool) -> Any:
        return gm.forward

    plan = {"tokens": "all", "start_step": 0, "score": score}
    monkeypatch.setattr(inductor_backend, "backend_compile", eager)
    expected = gradients(build(), **plan)
    torch.compiler.reset()
    monkeypatch.setattr(inductor_backend, "backend_compile", fake)
    got = gradients(build(), **plan)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    kinds = {line.split(":")[0] for line in gpu.choices if "sparselora" in line}
    assert {"sliced_linear", "sliced_linear_in", "sliced_linear_dgrad"} <= kinds, gpu.choices
    assert_predictors_are_small(gpu, at_most=kernels)


def assert_predictors_are_small(gpu: FakeGPU, at_most: int) -> None:
    """Pooling or sampling, norms and top-k of three choices (queries with keys, values,
    feed-forward): few kernels beside their matmuls, and no sync with the host."""
    names = (
        "pool_tokens", "low_rank_norms", "topk_channels", "sample_tokens", "channel_energy",
        "low_rank_energy",
    )  # fmt: skip
    (forward,) = [code for is_backward, code in gpu.codes if not is_backward]
    launched = re.findall(r"^ +(triton_\w+)\.run\(", forward, re.MULTILINE)
    predictor = [name for name in launched if any(part in name for part in names)]
    assert 0 < len(predictor) <= at_most, predictor
    assert ".item()" not in forward and ".cpu()" not in forward
