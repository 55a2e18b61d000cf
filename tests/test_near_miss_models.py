"""Almost a region, in whole models: what is asked of a model beside its loss, ties, and linears on
other things than tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_near_misses import HIDDEN, WIDTH, Adapted, Net, check, plain, reasons
from torch import Tensor, nn

import sparselora_fx as slx


def compare(model: nn.Module, data: dict[str, Any]) -> tuple[slx.Recording, str]:
    """One sliced step against the masked-dense step; what was recorded, and the table."""
    got = oracle.run_compiled(model, data, oracle.plan_of(0.5), restore=False)
    table = slx.explain(model)
    slx.restore(model)
    oracle.assert_close(got, oracle.reference_step(model, data, got.record), 1e-9)
    return got.record, table


def test_hidden_states_on_request_are_between_regions() -> None:
    model = oracle.llama(dtype=torch.float64)
    record, table = compare(model, {**oracle.batch(), "output_hidden_states": True})
    assert len(record.sites) == 7, table


def test_attentions_on_request_leave_the_attention_dense() -> None:
    """The probabilities that are returned were made from queries and keys."""
    model = oracle.llama(dtype=torch.float64, attention="eager")
    record, table = compare(model, {**oracle.batch(), "output_attentions": True})
    assert {name.split(".")[-2] for name in record.sites} == {"gate_proj", "up_proj", "down_proj"}
    why = reasons(table)
    assert len(why) == 4 and all("also read by the graph's output" in w for w in why.values()), why


def test_a_weight_tied_to_the_embedding_is_no_site() -> None:
    def tied() -> nn.Module:
        net = Net(plain)
        net.embedding = nn.Embedding(HIDDEN, WIDTH).requires_grad_(False)
        net.a.base.weight = net.embedding.weight
        return net

    record, table = check(tied)
    assert "a.base" not in table and record.sites == {}, table
    assert set(reasons(table)) == {"b.base", "out.base"}


class Pooled(nn.Module):
    """An FFN on the mean of a sample's tokens, beside one on the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(oracle.VOCABULARY, WIDTH).requires_grad_(False)
        self.up, self.down = Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, WIDTH)
        self.pool_up, self.pool_down = Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        pooled = self.pool_down(F.silu(self.pool_up(x.mean(1))))
        y = x + self.down(F.silu(self.up(x))) + pooled[:, None]
        return SimpleNamespace(loss=(y * (labels >= 0)[..., None]).square().mean())


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_a_linear_on_something_else_than_tokens(tokens: str) -> None:
    torch.manual_seed(0)
    model = Pooled().double().train()
    ids = oracle.batch()["input_ids"]
    data = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(13) < 8, -100)}
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, restore=False)
    table = slx.explain(model)
    slx.restore(model)
    if tokens == "all":
        assert len(got.record.sites) == 4, table
        with oracle.masked_reference(model, got.record):
            oracle.assert_close(got, oracle.step(model, data), 1e-9)
    else:
        assert set(got.record.sites) == {"up.base", "down.base"}, table
        why = reasons(table)
        assert set(why) == {"pool_up.base", "pool_down.base"}
        assert all("token grid" in reason for reason in why.values()), why
