"""Packed samples in a row, and KV caches: a sparse call means what the user's dense call means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sparselora_fx as slx
from tests.support import oracle
from tests.support.slow import slow
from tests.support.token_batches import by_token, predicting

KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def model_of(kind: str, cache: bool) -> nn.Module:
    config, causal = KINDS[kind]
    torch.manual_seed(0)
    base = causal(
        config(
            hidden_size=48, intermediate_size=112, num_hidden_layers=1, num_attention_heads=6,
            num_key_value_heads=2, head_dim=8, vocab_size=oracle.VOCABULARY, pad_token_id=0,
            use_cache=cache,
        )
    )  # fmt: skip
    return oracle.randomise(get_peft_model(base, oracle.lora_config())).double().train()


def packed() -> dict[str, Any]:
    """Two samples in a row, without an attention mask, as collators pack them."""
    data = oracle.batch(1, 16, padding=0)
    data["position_ids"] = torch.cat([torch.arange(7), torch.arange(9)])[None]
    data["labels"][0, [0, 1, 2, 7, 8, 9, 10]] = -100
    del data["attention_mask"]
    return data


class Wrapped(nn.Module):
    """A model around a causal one that says nothing of caches."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Any, position_ids: Any = None, labels: Any = None) -> Any:
        return self.lm(input_ids=input_ids, position_ids=position_ids, labels=labels)


def check(
    model: nn.Module, data: dict[str, Any], backend: str = "aot_eager", **options: Any
) -> None:
    """Every site is sliced; dense, sparse and evaluation calls agree with the user's own call."""
    user = float(model(**data).loss.detach())
    plan = slx.SparsityPlan(0.5, start_step=1, channel_multiple=1)
    estimator = oracle.estimator_of(model)
    slx.compile(model, estimator, plan=plan, backend=backend, **options)
    slx.step(model, 0, 10)
    assert float(model(**data).loss.detach()) == pytest.approx(user, rel=1e-9)
    slx.step(model, 1, 10)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    assert float(model.eval()(**data).loss) == pytest.approx(user, rel=1e-9)
    slx.restore(model.train())
    assert len(record.sites) == 7
    by_token(model, record, predicting(data), "dense")
    oracle.assert_close(got, oracle.step(model, data), 1e-6)


def samples_are_apart(model: nn.Module, data: dict[str, Any]) -> bool:
    """Whether the second sample is blind to the first."""
    other = {**data, "input_ids": data["input_ids"].clone()}
    other["input_ids"][0, 3] += 1
    with torch.no_grad():
        first, second = (model(**d).logits[0, 7:] for d in (data, other))
    return torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "cache", "backend"),
    [
        ("llama", True, "eager"),
        slow("llama", True, "aot_eager"),
        slow("qwen3", True, "aot_eager"),
        slow("mistral", True, "aot_eager"),
        slow("llama", False, "aot_eager"),
    ],
)
def test_packed_rows_mean_one_function(kind: str, cache: bool, backend: str) -> None:
    model, data = model_of(kind, cache), packed()
    assert samples_are_apart(model, data) is not cache  # as transformers has it
    check(model, data, backend)


@pytest.mark.slow
def test_packed_rows_in_blocks_compiled_one_by_one() -> None:
    check(model_of("llama", True), packed(), regional=True)


@pytest.mark.slow
@pytest.mark.parametrize("position_ids", [True, False], ids=["packed", "plain"])
def test_attention_in_a_wrapper_is_sliced_whatever_use_cache_says(position_ids: bool) -> None:
    data = packed()
    if not position_ids:
        del data["position_ids"]
    check(Wrapped(model_of("llama", True)), data)


def test_a_cache_that_is_asked_for_is_the_reason() -> None:
    model, data = model_of("llama", True), packed()
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    model(**data, use_cache=True)
    lines = [line for line in slx.explain(model, verbose=True).splitlines() if "self_attn" in line]
    assert len(lines) == 4 and all("KV cache" in line for line in lines)
