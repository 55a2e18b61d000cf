"""Which weights count as frozen, and what they are called."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparselora_fx.model.blocks import block_positions
from sparselora_fx.model.frozen_weights import (
    canonical_path,
    fingerprint_of,
    frozen_weights,
    suffix_distance,
)

PROJECTIONS = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}


def llama(layers: int = 2, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=48,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_lists_the_projections_only(tied: bool) -> None:
    base = llama(tied=tied).requires_grad_(False)
    expected = {f"model.layers.{i}.{p}" for i in range(2) for p in PROJECTIONS}
    assert {w.name for w in frozen_weights(base)} == expected
    modules = dict(base.named_modules())
    for w in frozen_weights(base):
        assert w.module is modules[w.name]
        assert w.weight is modules[w.name].weight
        assert not w.transposed and not w.shared


def test_canonical_names_are_equal_with_and_without_peft() -> None:
    plain = {w.canonical for w in frozen_weights(llama().requires_grad_(False))}
    config = LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True)
    adapted = get_peft_model(llama(), config)
    weights = frozen_weights(adapted)
    assert {w.canonical for w in weights} == plain
    modules = dict(adapted.named_modules())
    assert all(modules[w.name] is w.module for w in weights)
    assert any(w.name.endswith("q_proj.base_layer") for w in weights)


def test_an_inactive_frozen_adapter_does_not_count() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    before = [w.name for w in frozen_weights(model)]
    model.add_adapter("second", LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    assert (
        not model.get_submodule(before[0].rpartition(".")[0]).lora_A["default"].weight.requires_grad
    )
    canonical = {w.canonical for w in frozen_weights(model)}
    assert canonical == {canonical_path(name) for name in before}


def test_a_head_adapted_by_lora_or_copied_for_training_does_not_count() -> None:
    for config in (
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        model = get_peft_model(llama(), config)
        assert not [w.name for w in frozen_weights(model) if "lm_head" in w.name]


def test_conv1d_is_transposed() -> None:
    for model in (
        gpt2().requires_grad_(False),
        get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
    ):
        weights = {w.canonical: w for w in frozen_weights(model)}
        assert len(weights) == 8  # neither wte, wpe nor the tied lm_head
        fused = weights["transformer.h.0.attn.c_attn"]
        assert fused.transposed and fused.weight.shape == (32, 96)
        assert (fused.out_features, fused.in_features) == (96, 32)
        x = torch.randn(5, 32)
        got = x @ fused.logical().t() + fused.module.bias
        torch.testing.assert_close(got, fused.module(x))
        assert fused.logical().data_ptr() == fused.weight.data_ptr()


class RawLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.w_out = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 4), requires_grad=False)
        self.trained = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4), requires_grad=False)
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


def test_hand_written_parameters_count_by_their_own_name() -> None:
    model = nn.Sequential(RawLayer(), nn.LayerNorm(4), nn.Embedding(5, 4)).requires_grad_(False)
    model[0].trained.requires_grad_(True)
    weights = frozen_weights(model)
    assert [(w.name, w.param, w.canonical) for w in weights] == [
        ("0.w_in", "w_in", "0.w_in"),
        ("0.w_out", "w_out", "0.w_out"),
    ]
    assert weights[0].weight is model[0].w_in


def test_a_shared_parameter_is_listed_once_with_its_other_names() -> None:
    first, second, third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "c": third, "again": third})
    (shared, single) = frozen_weights(model.requires_grad_(False))
    assert (shared.name, shared.shared) == ("a", frozenset({"b"}))
    assert (single.name, single.shared) == ("c", frozenset({"again"}))


def test_trainable_models_have_none_and_nothing_is_changed() -> None:
    model = llama()
    state = {key: (value.clone(), value.requires_grad) for key, value in model.named_parameters()}
    assert frozen_weights(model) == []
    for key, value in model.named_parameters():
        assert torch.equal(value, state[key][0]) and value.requires_grad == state[key][1]


@pytest.mark.parametrize(
    ("key", "name", "distance"),
    [
        ("layers.1.mlp", "base_model.model.model.layers.1.mlp", 0),
        ("layers.1.mlp", "model.layers.1.mlp.up_proj", 1),
        ("layers.1.mlp", "model.layers.1.mlp.up_proj.base_layer", 1),
        ("layers.1.mlp", "model.xlayers.1.mlp", None),
        ("layers.1.mlp", "model.layers.11.mlp", None),
        ("layers.1.mlp", "model.layers.1.mlp2", None),
        ("layers.1.mlp", "model.layers.1", None),
        ("a", "a.b.a.c", 1),
        ("layers.1.mlp", "layers.1._orig_mod.mlp", 0),
    ],
)
def test_suffix_distance(key: str, name: str, distance: int | None) -> None:
    assert suffix_distance(key, name) == distance


def test_blocks_are_found_under_experts_and_in_encoder_decoders() -> None:
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    blocks = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in experts)})
        for _ in range(3)
    )
    model = nn.ModuleDict({"layers": blocks, "top": nn.Linear(2, 2)}).requires_grad_(False)
    places = block_positions(frozen_weights(model))
    assert places["layers.2.experts.5"] == (2, 3) and "top" not in places
    stacks = {
        "encoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)),
        "decoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(4)),
        "top": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)),
    }
    places = block_positions(frozen_weights(nn.ModuleDict(stacks).requires_grad_(False)))
    assert places["encoder.1"] == (1, 2) and places["decoder.1"] == (1, 4)


def test_fingerprint_survives_a_cast_and_a_relayout_but_no_change() -> None:
    w = torch.randn(70, 50, dtype=torch.float64)
    print_ = fingerprint_of(w)
    assert print_.startswith("70x50:")
    assert print_ == fingerprint_of(w.float()) == fingerprint_of(w.float().to(torch.bfloat16))
    assert print_ == fingerprint_of(w.t().contiguous().t())
    assert print_ != fingerprint_of(w + 0.01)
    assert print_ != fingerprint_of(w.reshape(50, 70))
    assert fingerprint_of(torch.ones(1, 1)) != fingerprint_of(torch.zeros(1, 1))
