"""Almost a region, in whole models: what is asked of a model beside its loss, ties, and linears on
other things than tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import HIDDEN, WIDTH, Adapted, Net, check, plain, reasons
from tests.support.slow import slow


def compare(model: nn.Module, data: dict[str, Any]) -> tuple[slx.Recording, str]:
    """One sliced step against the masked-dense step; what was recorded, and the table."""
    got = oracle.run_compiled(model, data, oracle.plan_of(0.5), restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    oracle.assert_close(got, oracle.reference_step(model, data, got.record), 1e-9)
    return got.record, table


@pytest.mark.slow
def test_hidden_states_on_request_are_between_regions() -> None:
    model = oracle.llama(dtype=torch.float64)
    record, table = compare(model, {**oracle.batch(), "output_hidden_states": True})
    assert len(record.sites) == 7, table


@pytest.mark.slow
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

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> SimpleNamespace:
        x = self.embedding(input_ids)
        pooled = self.pool_down(F.silu(self.pool_up(x.mean(1))))
        y = x + self.down(F.silu(self.up(x))) + pooled[:, None]
        return SimpleNamespace(loss=(y * (labels >= 0)[..., None]).square().mean())


def pooled_batch() -> dict[str, Tensor]:
    ids = oracle.batch()["input_ids"]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(13) < 8, -100)}


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_a_linear_on_something_else_than_tokens(tokens: str) -> None:
    torch.manual_seed(0)
    model = Pooled().double().train()
    data = pooled_batch()
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert set(got.record.sites) == {"up.base", "down.base"}, table
    why = reasons(table)
    assert set(why) == {"pool_up.base", "pool_down.base"}
    said = "padding cannot be told" if tokens == "all" else "token grid"
    assert all(said in reason for reason in why.values()), why
    if tokens == "all":
        with oracle.masked_reference(model, got.record):
            oracle.assert_close(got, oracle.step(model, data), 1e-9)


def test_without_a_mask_every_row_counts_whatever_it_is() -> None:
    """Nothing is padding, so the mean of a sample's tokens is no padding either. A mask that the
    model does not read comes with a graph of its own."""
    torch.manual_seed(0)
    model = Pooled().double().train()
    data = pooled_batch()
    masked = {**data, "attention_mask": torch.ones_like(data["input_ids"])}
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    with slx.record(model) as record:
        got = oracle.step(model, data)
    with slx.record(model) as second:
        oracle.step(model, masked)
    slx.restore(model)
    assert len(record.sites) == 4 and set(second.sites) == {"up.base", "down.base"}
    with oracle.masked_reference(model, record):
        oracle.assert_close(got, oracle.step(model, data), 1e-9)


class TimeMajor(nn.Module):
    """An FFN on tokens that are laid out ``[length, samples]`` or ``[samples, 1, length]``."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(oracle.VOCABULARY, WIDTH).requires_grad_(False)
        self.up, self.down = Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, WIDTH)
        self.layout = layout

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        h = x[:, None] if self.layout == "extra" else x.transpose(0, 1)
        h = h.reshape(-1, WIDTH) if self.layout == "flat" else h
        y = self.down(F.silu(self.up(h)))
        y = y.view(x.shape[1], x.shape[0], WIDTH) if self.layout == "flat" else y
        y = y[:, 0] if self.layout == "extra" else y.transpose(0, 1)
        weight = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
        return SimpleNamespace(
            loss=((x + y) * weight * (labels >= -100)[..., None]).square().mean()
        )


@pytest.mark.parametrize("layout", ["major", "flat"])
def test_tokens_in_another_order_than_the_labels_stay_dense(layout: str) -> None:
    torch.manual_seed(0)
    model = TimeMajor(layout).double().train()
    ids = oracle.batch()["input_ids"]
    data = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(13) < 8, -100)}
    plan = slx.SparsityPlan(0.5, tokens="context", start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, restore=False)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert got.record.sites == {}, table
    assert all("token grid" in reason for reason in reasons(table).values()), table
    oracle.assert_close(got, oracle.step(model, data), 1e-9)


def _masked_on(context: Tensor, linear: nn.Linear, role: str, chosen: Tensor) -> Any:
    mask = torch.zeros(linear.weight.shape[0 if role == "out" else 1], dtype=linear.weight.dtype)
    mask[chosen] = 1

    def forward(x: Tensor) -> Tensor:
        cut = x * mask if role == "in" else x
        masked = F.linear(cut, linear.weight) * (1 if role == "in" else mask)
        return torch.where(context[:, None], masked, F.linear(x, linear.weight)) + linear.bias

    return forward


def test_tokens_with_a_dimension_more_are_sliced() -> None:
    """Tokens 0 to 6 and the last one predict nothing that carries loss: they alone are sparse."""
    torch.manual_seed(0)
    model = TimeMajor("extra").double().train()
    ids = oracle.batch(padding=0)["input_ids"]
    data = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(13) < 8, -100)}
    plan = slx.SparsityPlan(0.5, tokens="context", start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, restore=False, shift=True)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert set(got.record.sites) == {"up.base", "down.base"}, table
    position = torch.arange(13)
    for name, (role, chosen) in got.record.sites.items():
        linear: Any = model.get_submodule(name)
        linear.forward = _masked_on((position < 7) | (position == 12), linear, role, chosen)
    oracle.assert_close(got, oracle.step(model, data), 1e-9)


class Experts(nn.Module):
    """A router over three experts whose matrices are one parameter, beside a plain FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Net(plain)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.2, requires_grad=False)
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3, padding=1).requires_grad_(False)
        self.router = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        mixed = torch.einsum("blk,eko,ble->blo", x, self.experts, share)
        return self.ffn(x) + mixed + self.kernel(x.transpose(1, 2)).transpose(1, 2)


def test_a_stack_of_experts_is_dense_and_says_so() -> None:
    record, table = check(Experts)
    assert set(record.sites) == {"ffn.a.base", "ffn.b.base", "ffn.out.base"}, table
    line = next(line for line in table.splitlines() if line.startswith("experts "))
    assert "3x24x24" in line and "dense: a stack of matrices" in line, table
    assert "kernel" not in table and "3 of 3 frozen linears rewritten" in table


class Routed(nn.Module):
    """Two FFNs, each on the tokens of its own; none may be left for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(plain), Net(plain)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[language] = self.first(x[language])
        out[~language] = self.second(x[~language])
        return out.square().sum()


@pytest.mark.parametrize(
    ("first", "dense_phase"),
    [(0, True), (7, False), slow(0, False), slow(7, True), slow(3, True), slow(3, False)],
)
def test_tokens_that_are_routed_may_be_none(first: int, dense_phase: bool) -> None:
    torch.manual_seed(0)
    model = Routed().double().train()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    language = torch.arange(7).expand(2, 7) < first
    estimator = None if dense_phase else oracle.estimator_of(model, 3)
    start = 1 if dense_phase else 0
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=start, channel_multiple=1)
    slx.compile(model, estimator, plan=plan, backend="aot_eager")
    for n in range(2):
        slx.step(model, n)
        model.zero_grad()
        with slx.record(model) as record:
            loss = model(x, language)
            loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    slx.restore(model)
    assert len(record.sites) == 6
    model.zero_grad()
    with oracle.masked_reference(model, record):
        expected = model(x, language)
        expected.backward()
    assert oracle.difference(loss, expected) <= 1e-9
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (got[name] is None) == (p.grad is None), name
            assert p.grad is None or torch.allclose(got[name], p.grad, atol=1e-12), name
