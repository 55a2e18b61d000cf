"""Padding that a model reads is computed, densely; padding that nobody reads is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ConvBertConfig, ConvBertForMaskedLM, RwkvConfig, RwkvForCausalLM

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from tests.support import oracle
from tests.support.padded_batches import ragged
from tests.support.rewritten_graphs import rewritten
from tests.support.slow import slow
from tests.support.token_batches import by_token, predicting

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def mixed(y: Tensor) -> Tensor:
    """Each token with those near it on both sides, padding or not."""
    after, before = F.pad(y[:, 2:], (0, 0, 0, 2)), F.pad(y[:, :-1], (0, 0, 1, 0))
    return y + 0.3 * after + 0.2 * before


def mixing(layer: int) -> nn.Module:
    """A Llama that mixes neighbouring tokens behind the feed-forward block of one layer."""
    model = oracle.llama(layers=2, dtype=torch.float64)
    block = model.get_base_model().model.layers[layer]
    block.mlp.down_proj = oracle.Behind(block.mlp.down_proj, mixed)
    return model


def checkpointed(layer: int) -> nn.Module:
    model = mixing(layer)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def written_out() -> nn.Module:
    return oracle.llama(layers=2, dtype=torch.float64, attention="eager")


def rwkv() -> nn.Module:
    """A recurrence, which has no mask."""
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=oracle.VOCABULARY, hidden_size=48, num_hidden_layers=2, context_length=32,
        attention_hidden_size=48, intermediate_size=96, use_cache=False,
    )  # fmt: skip
    lora = oracle.lora_config(("key", "value", "receptance"))
    model = get_peft_model(RwkvForCausalLM(config), lora)
    return oracle.randomise(model).double().train()


def convbert() -> nn.Module:
    """Convolutions over tokens, beside attention."""
    torch.manual_seed(0)
    config = ConvBertConfig(
        vocab_size=oracle.VOCABULARY, hidden_size=48, embedding_size=48, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=96, hidden_dropout_prob=0.0, head_ratio=2,
        attention_probs_dropout_prob=0.0, max_position_embeddings=32, conv_kernel_size=3,
    )  # fmt: skip
    lora = oracle.lora_config(("query", "key", "value", "dense"))
    lora.task_type = None
    model = get_peft_model(ConvBertForMaskedLM(config), lora)
    return oracle.randomise(model).double().train()


READ = {
    "mixing in the last layer": (lambda: mixing(1), True),
    "mixing in the last layer, checkpointed": (lambda: checkpointed(1), True),
    "mixing in the first layer": (lambda: mixing(0), True),
    "recurrence": (rwkv, True),
    "convolution": (convbert, False),
}


FEW = ("mixing in the last layer", "convolution")


def same_as_masked_dense(model: nn.Module, data: dict[str, Any], *, shift: bool = True) -> None:
    """Loss and gradients of a step with padding dense, as the reference computes it."""
    got = oracle.run_compiled(model, data, PLAN)
    assert got.record.sites
    dense = predicting(data) if shift else data["labels"] != -100
    by_token(model, got.record, dense | (data["attention_mask"] == 0), "dense")
    oracle.assert_close(got, oracle.step(model, data), 1e-9)


@pytest.mark.parametrize("left", [False, slow(True)], ids=["right", "left"])
@pytest.mark.parametrize("case", [case if case in FEW else slow(case) for case in READ])
def test_padding_that_is_read(case: str, left: bool) -> None:
    build, shift = READ[case]
    same_as_masked_dense(build(), ragged(left=left), shift=shift)


@pytest.mark.parametrize("left", [False, slow(True)], ids=["right", "left"])
def test_padding_that_predicts_a_label_and_is_read(left: bool) -> None:
    data = ragged(left=left)
    data["labels"][1, :] = data["input_ids"][1, :]
    same_as_masked_dense(mixing(1), data)


@pytest.mark.parametrize(
    ("build", "lists"),
    [(oracle.llama, 2), slow(written_out, 2), slow(lambda: mixing(1), 2), (lambda: mixing(0), 3)],
    ids=["attention", "written out", "mixing in the last layer", "mixing in the first layer"],
)
def test_lists_that_are_taken(
    build: Callable[[], nn.Module], lists: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context and output tokens; where padding is read, all but context tokens instead."""
    graph, _ = rewritten(monkeypatch, build(), ragged(), PLAN)
    takes = graph.find_nodes(op="call_function", target=OPS.gather_tokens.default)
    assert len({take.args[1] for take in takes}) == lists


class SequenceFirst(nn.Module):
    """A small model whose rows are ``[L * B, N]``: tokens first, samples inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(oracle.VOCABULARY, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, oracle.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        samples, length = input_ids.shape
        x = F.layer_norm(self.embed(input_ids).transpose(0, 1).reshape(-1, 24), (24,))
        x = x + self.down(F.silu(self.up(x)))
        logits = self.head(x).view(length, samples, -1).transpose(0, 1)
        rows = logits[:, :-1].reshape(-1, oracle.VOCABULARY)
        return SimpleNamespace(loss=F.cross_entropy(rows, labels[:, 1:].reshape(-1)))


def test_rows_in_another_order_are_left_dense() -> None:
    torch.manual_seed(0)
    lora = oracle.lora_config(("up", "down"))
    lora.task_type = None
    model = oracle.randomise(get_peft_model(SequenceFirst(), lora)).double().train()
    data = ragged()
    got = oracle.run_compiled(model, data, PLAN, restore=False)
    assert not got.record.sites
    assert "not the token grid" in slx.explain(model, verbose=True)
    slx.restore(model)
    oracle.assert_close(got, oracle.step(model, data), 1e-12)


def unit_norm(y: Tensor) -> Tensor:
    """Rows divided by their length, which rows of zeros do not have."""
    return y / y.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "name", [slow("self_attn.k_proj"), slow("self_attn.o_proj"), "mlp.down_proj"]
)
def test_rows_of_padding_have_a_norm(name: str) -> None:
    targets = ("q_proj", "v_proj", "gate_proj", "up_proj")
    model = oracle.llama(layers=2, dtype=torch.float64, targets=targets)
    for block in model.get_base_model().model.layers:
        owner, _, word = name.partition(".")
        inner = block.get_submodule(owner)
        setattr(inner, word, oracle.Behind(getattr(inner, word), unit_norm))
    same_as_masked_dense(model, ragged())
