"""Every kind of adapter that PEFT makes, and other trainable parts: right, and sliced where it can
be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import sparselora_fx as slx
from tests.support import oracle
from tests.support.slow import slow

SITES = 7  # frozen linears of a Llama block
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": oracle.VOCABULARY, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def llama(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(attention_bias=bias, mlp_bias=bias, **SMALL))


def adapted(base: nn.Module, **options: Any) -> nn.Module:
    chosen = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | options
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
    return oracle.randomise(model).double().train()


def two_active() -> nn.Module:
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    return oracle.randomise(model).double().train()


def compare(model: nn.Module, lora_branch: str = "dense") -> tuple[slx.Recording, str]:
    """One sliced step against the masked-dense step; what was recorded, and the table."""
    data = oracle.batch()
    plan = oracle.plan_of(0.5)
    got = oracle.run_compiled(model, data, plan, lora_branch=lora_branch, restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    expected = oracle.reference_step(model, data, got.record, lora_branch=lora_branch)
    oracle.assert_close(got, expected, 1e-9)
    return got.record, table


SLICED: dict[str, Callable[[], nn.Module]] = {
    "rslora": lambda: adapted(llama(), use_rslora=True),
    "patterns": lambda: adapted(
        llama(), rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"up_proj": 32}
    ),
    "biases train": lambda: adapted(llama(bias=True), bias="lora_only"),
    "lora_bias": lambda: adapted(llama(bias=True), lora_bias=True),
    "two active": two_active,
    "head saved": lambda: adapted(llama(), modules_to_save=["lm_head"]),
    "embedding": lambda: adapted(
        llama(), target_modules=["embed_tokens", "q_proj", "gate_proj", "down_proj"]
    ),
}


FEW = ("lora_bias", "two active", "embedding")


@pytest.mark.parametrize("name", [name if name in FEW else slow(name) for name in SLICED])
def test_all_linears_are_sliced_and_right(name: str) -> None:
    record, table = compare(SLICED[name]())
    assert len(record.sites) == SITES, table


@pytest.mark.parametrize("name", [slow("two active"), "patterns"])
def test_sparse_branches_of_several_adapters(name: str) -> None:
    record, table = compare(SLICED[name](), "sparse")
    assert len(record.sites) == SITES, table


def test_a_linear_that_is_trained_whole_leaves_its_region_dense() -> None:
    model = adapted(llama(), target_modules=["q_proj", "v_proj"], modules_to_save=["down_proj"])
    record, table = compare(model)
    assert len(record.sites) == 4, table
    assert "mlp" not in "".join(record.sites), table


@pytest.mark.slow
def test_adapters_on_parameters_leave_those_dense() -> None:
    """`target_parameters`: the weight that is multiplied is computed in the graph."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SMALL))
    base.set_experts_implementation("batched_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(base, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    record, table = compare(model)
    assert {name.split(".")[5] for name in record.sites} == {"self_attn"}, table
    assert len(record.sites) == 4, table


@pytest.mark.slow
def test_an_adapter_on_a_linears_weight_parameter() -> None:
    model = adapted(llama(), target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    record, table = compare(model)
    assert len(record.sites) == 4, table
    assert "dense: its adapter, target_parameters, gives the linear another weight" in table, table


# ---------------------------------------------------------------- no LoRA at all


def prompt_tuned() -> nn.Module:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return oracle.randomise(get_peft_model(llama(), config)).double().train()


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_prompt_tuning(tokens: str) -> None:
    model, data = prompt_tuned(), oracle.batch()
    data["labels"][:, :5] = -100
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    if tokens == "context":  # virtual tokens have no labels, so the grids differ
        assert got.record.sites == {}, table
    expected = oracle.reference_step(model, data, got.record)
    oracle.assert_close(got, expected, 1e-9)
    assert list(got.gradients) == ["prompt_encoder.default.embedding.weight"]
    assert tokens == "context" or len(got.record.sites) == SITES, table


def test_only_the_head_trains() -> None:
    model = oracle.randomise(llama()).double().train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    record, table = compare(model)
    assert len(record.sites) == SITES, table
