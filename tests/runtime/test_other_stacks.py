"""Rows that are not the batch's tokens stay dense, also where there are as many of them: images,
a second text. So what a step means does not hang on how long the text happens to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

import sparselora_fx as slx
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.model.text_part import beside_text
from tests.support import oracle
from tests.support.tiny_models import Block, Output
from tests.support.token_batches import by_token, predicting, ragged

LENGTH, HIDDEN = 17, 16


class TwoStreams(nn.Module):
    """A second stream goes through a block of its own, and its mean into the text."""

    def __init__(self, kind: str, *, broken: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv1d(3, HIDDEN, 1).requires_grad_(False)
        self.register_buffer("places", torch.arange(LENGTH)[None])
        self.text = nn.Module()
        self.text.words = nn.Embedding(97, HIDDEN).requires_grad_(False)
        self.text.layers = nn.ModuleList([Block(HIDDEN, 40, 0.0)])
        self.other = nn.Module()
        self.other.layers = nn.ModuleList([Block(HIDDEN, 40, 0.0)])
        self.kind, self.broken = kind, broken

    def get_input_embeddings(self) -> nn.Module:
        return self.text.words  # type: ignore[return-value]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, other: Tensor | None = None,
    ) -> Output:  # fmt: skip
        assert labels is not None and other is not None
        y = (
            self.text.words(other)
            if self.kind == "text"
            else self.patches(other.transpose(1, 2)).transpose(1, 2) + self.text.words(self.places)
        )
        if self.broken:
            torch._dynamo.graph_break()
        y = self.other.layers[0](y).mean(1, keepdim=True)  # type: ignore[index]
        x = self.text.words(input_ids)
        if self.broken:
            torch._dynamo.graph_break()
        x = self.text.layers[0](x + y)  # type: ignore[index]
        logits = x @ self.text.words.weight.T
        return Output(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits
        )


def batch(kind: str) -> dict[str, Any]:
    data = ragged(length=LENGTH)
    torch.manual_seed(4)
    if kind == "text":
        return data | {"other": torch.randint(1, 97, (3, LENGTH))}
    return data | {"other": torch.randn(3, LENGTH, 3).double()}


def check(model: nn.Module, data: dict[str, Any], other: str, text: str, **options: Any) -> None:
    """Nothing of the other part is sliced, something of the text's is, and right."""
    reference = copy.deepcopy(model)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    slx.restore(model)
    assert [name for name in record.sites if text in name]
    assert not [name for name in record.sites if other in name]
    by_token(reference, record, predicting(data), "dense")
    oracle.assert_close(got, oracle.step(reference, data), 1e-12)


@pytest.mark.parametrize("way", ["whole", "broken", "regional"])
@pytest.mark.parametrize("kind", ["text", "patches"])
def test_a_second_stream_of_as_many_rows_is_dense(kind: str, way: str) -> None:
    torch.manual_seed(0)
    model = TwoStreams(kind, broken=way == "broken").double().train()
    options = {"regional": True, "shift": True} if way == "regional" else {}
    check(model, batch(kind), "other.", "text.", **options)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_as_many_patches_as_tokens(regional: bool) -> None:
    """Gemma 3, whose images have 64 patches each here, beside a text of 64 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = SiglipVisionConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=2)
    text = Gemma3TextConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=97,
        pad_token_id=0,
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_index=90,
        image_token_id=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    names = "q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2"
    lora = LoraConfig(r=4, target_modules=rf".*({names})", task_type="CAUSAL_LM")
    model = oracle.randomise(get_peft_model(Gemma3ForConditionalGeneration(config), lora))
    ids = torch.randint(3, 80, (2, 64))
    ids[:, 2:18] = 90
    labels = ids.clone()
    labels[:, :30] = -100
    data = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "token_type_ids": (ids == 90).long(), "use_cache": False,
        "pixel_values": torch.randn(2, 3, 16, 16).double(),
    }  # fmt: skip
    check(model.double().train(), data, "vision", "language_model", regional=regional)


def test_the_text_part_holds_the_words_and_their_blocks() -> None:
    model = TwoStreams("text")
    outside = beside_text(model, frozen_weights(model))
    assert outside and all(name.startswith("other.") for name in outside)
    llama = oracle.llama(layers=2)
    assert beside_text(llama, frozen_weights(llama)) == frozenset()
    plain = nn.Sequential(Block(HIDDEN, 40, 0.0), Block(HIDDEN, 40, 0.0))
    assert beside_text(plain, frozen_weights(plain)) == frozenset()
