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
    [("template", "strided+weighted", 29), ("fallback", "pooled", 23)],
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
    assert_launches_are_few(gpu, at_most=kernels)


def assert_launches_are_few(gpu: FakeGPU, at_most: int) -> None:
    """Kernels of the forward beside matmuls of libraries: independent ones share a launch, whether
    they serve a predictor or an adapter, and there is no sync with the host."""
    (forward,) = [code for is_backward, code in gpu.codes if not is_backward]
    launched = re.findall(r"^ +(triton_\w+)\.run\(", forward, re.MULTILINE)
    shared = [name for name, source in gpu.kernels if "combo_grid_meta" in source]
    assert set(shared).intersection(launched)
    assert 0 < len(launched) <= at_most, launched
    # Queries with keys, and values: one selection. The feed-forward's is the other.
    choosing = {name for name, source in gpu.kernels if "(key >= trial)" in source}
    assert sum(name in choosing for name in launched) == 2 and "aten.topk" not in forward
    assert ".item()" not in forward and ".cpu()" not in forward
