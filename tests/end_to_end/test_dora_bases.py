"""DoRA on other bases: GPT-2's Conv1D, fp32 adapters on bf16 weights, and under Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import sparselora_fx as slx
from tests.support import oracle
from tests.support.masked_products import randomise_dora, reference_step
from tests.support.slow import slow

LLAMA = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def with_dora(base: nn.Module, targets: list[str], **words: object) -> nn.Module:
    """DoRA whose magnitudes are not the norms of their rows, and non-zero B."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True, **words)
    model = get_peft_model(base, lora).train()
    return randomise_dora(model)


def gpt2(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=oracle.VOCABULARY, n_positions=32,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    base = oracle.randomise(GPT2LMHeadModel(config))
    words = {"lora_dropout": dropout, "fan_in_fan_out": True}
    return with_dora(base, ["c_attn", "c_proj", "c_fc"], **words).double()


def on_bf16(dropout: float) -> nn.Module:
    """PEFT keeps the adapters of a bf16 model in fp32."""
    base = oracle.llama(bias=True).unload().to(torch.bfloat16)
    model = with_dora(base, LLAMA, lora_dropout=dropout)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model


@pytest.mark.parametrize("dropout", [slow(0.0), 0.3])
@pytest.mark.parametrize("tokens", [slow("all"), "context"])
def test_conv1d(dropout: float, tokens: str) -> None:
    """Weights stored [K, N]; with dropout PEFT multiplies with each of them twice."""
    model, data = gpt2(dropout), oracle.batch()
    data["labels"][:, :7] = -100
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, backend="eager", restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert len(got.record.sites) == 4, table
    context = [] if tokens == "all" else [~F.pad(data["labels"][:, 1:] != -100, (0, 1))]
    oracle.assert_close(got, reference_step(model, data, got.record, *context), 1e-9)


@pytest.mark.parametrize("dropout", [slow(0.0), 0.3])
def test_fp32_adapters_on_a_bf16_base(dropout: float) -> None:
    """Products of both dtypes are sliced; the bound is that of gradients which pass two in bf16."""
    model, data = on_bf16(dropout), oracle.batch()
    got = oracle.run_compiled(model, data, oracle.plan_of(0.5), backend="eager", restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert len(got.record.sites) == 7, table
    assert {g.dtype for g in got.gradients.values()} == {torch.float32}
    oracle.assert_close(got, reference_step(model, data, got.record), 3e-2)


@pytest.mark.slow
def test_inductor() -> None:
    """A producer and a consumer: each more has further kernels for its norms, there and back."""
    model = with_dora(oracle.llama().unload(), ["up_proj", "down_proj"], lora_dropout=0.0).float()
    data = oracle.batch()
    got = oracle.run_compiled(model, data, oracle.plan_of({"mlp": 0.5}), backend="inductor")
    assert len(got.record.sites) == 3
    oracle.assert_close(got, reference_step(model, data, got.record), 1e-4)
