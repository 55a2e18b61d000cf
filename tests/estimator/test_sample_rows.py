"""Which rows are observed, and the pass that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparselora_fx as slx
from sparselora_fx.estimator.sample_rows import ROWS, SPAN, distinct, pick
from sparselora_fx.ir.token_lists import Tokens
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle

CPU = torch.device("cpu")


def tokens_of(mask: Tensor) -> Tokens:
    return Tokens(mask, torch.zeros_like(mask), False)


@pytest.mark.parametrize("total", [0, 1, 5, ROWS - 1, ROWS])
def test_few_tokens_are_all_taken_once(total: int) -> None:
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask.view(-1)[torch.randperm(600)[:total]] = True
    for call in range(5):
        picked = pick(tokens_of(mask), CPU, call)
        assert picked.count == total and picked.tensors[2].shape == (ROWS,)
        expected = mask.flatten().nonzero().flatten()
        assert torch.equal(picked.tensors[2][:total], expected)


def test_each_of_many_tokens_is_taken_alike_often() -> None:
    """Over many calls no token is favoured: not the first, not those at multiples of a stride."""
    mask = torch.ones(4, ROWS, dtype=torch.bool)
    mask[1, :9] = False
    counts, calls = torch.zeros(mask.numel()), 200
    for call in range(calls):
        picked = pick(tokens_of(mask), CPU, call)
        idx = picked.tensors[2]
        assert picked.count == ROWS == len(idx.unique()) and bool(mask.flatten()[idx].all())
        counts[idx] += 1
    expected = calls * ROWS / int(mask.sum())
    assert counts[~mask.flatten()].sum() == 0
    assert (counts[mask.flatten()] - expected).abs().max() <= 3  # a draw would leave about 20


@pytest.mark.parametrize("rows", [1, 7, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 3])
def test_places_cover_other_grids(rows: int) -> None:
    for call in range(20):
        (places,) = pick(None, CPU, call).tensors
        taken = places * rows // SPAN
        left = distinct(torch.arange(rows)[taken][:, None], taken).flatten()
        assert len(left) == min(rows, ROWS) == len(left.unique())
        assert int(left.min()) >= 0 and int(left.max()) < rows


class Block(nn.Module):
    """A feed-forward block that halves the length before it: another grid than the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.up = nn.Linear(12, 32, bias=False)
        self.down = nn.Linear(32, 12, bias=False)
        self.adapter = nn.Linear(12, 12)
        for frozen in (self.embed, self.up, self.down):
            frozen.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.adapter(self.embed(input_ids))
        self.read = x = x[:, ::2]
        return {"loss": self.down(F.gelu(self.up(x))).square().mean()}


def test_an_input_of_another_grid_counts_all_its_rows() -> None:
    model = Block().double()
    plan = slx.SparsityPlan(0.5, channel_multiple=1, start_step=9, calibrate="dense_phase")
    slx.compile(model, plan=plan, backend="eager")
    ids = torch.randint(50, (3, 8))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    read = []
    for n, count in enumerate((8, 8, 6)):
        slx.step(model, n)
        model(input_ids=ids[:, :count], attention_mask=mask[:, :count])["loss"].backward()
        read.append(model.adapter(model.embed(ids[:, :count]))[:, ::2].reshape(-1, 12).detach())
    collector = get_runtime(model).collector
    assert collector is not None
    moment, x = collector.moments["up"], torch.cat(read)
    assert moment.count == len(x) == 33
    torch.testing.assert_close(moment.square(), x.square().mean(dim=0))
    torch.testing.assert_close(moment.covariance(), torch.cov(x.t(), correction=0))


@pytest.mark.slow
def test_encoder_decoder_models_are_observed() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    base = T5ForConditionalGeneration(config)
    targets = ["q", "k", "v", "o", "wi", "wo"]
    lora = LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = oracle.randomise(get_peft_model(base, lora)).train()
    plan = slx.SparsityPlan(0.5, channel_multiple=1, start_step=2, calibrate="dense_phase")
    slx.compile(model, plan=plan, backend="eager")
    data = {"input_ids": torch.randint(1, 60, (2, 9)), "labels": torch.randint(1, 60, (2, 5))}
    for n in range(3):
        slx.step(model, n)
        with slx.record(model) as record:
            oracle.step(model, data)
        collector = get_runtime(model).collector
        assert collector is not None
        if n == 1:
            counts = {key: moment.count for key, moment in collector.moments.items()}
            assert {count for key, count in counts.items() if "encoder" in key} >= {36}
            assert {count for key, count in counts.items() if key.endswith("wo")} == {20, 36}
    assert record.sites and collector.estimator is not None and collector.estimator.calibrated
