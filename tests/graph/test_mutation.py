"""What a graph writes into is read where the model reads it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparselora_fx as slx
from sparselora_fx.graph.mutation import is_mutated
from sparselora_fx.graph.nodes import changes_input
from tests.support import oracle
from tests.support.padded_batches import ragged
from tests.support.slow import slow
from tests.support.token_batches import by_token, predicting

WIDTH, HIDDEN = 40, 72
PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def by_item(x: Tensor) -> Tensor:
    m = torch.ones_like(x[..., :1])
    m[:, 8] = 3.0
    return m


def by_method(x: Tensor) -> Tensor:
    m = torch.ones_like(x[..., :1])
    m.mul_(torch.arange(x.shape[1])[:, None] + 1.0)
    return m


def by_view(x: Tensor) -> Tensor:
    m = torch.ones_like(x[..., :1])
    rows = m.transpose(0, 1)[2:]
    rows.fill_(0.5)
    return m


def by_out(x: Tensor) -> Tensor:
    m = torch.ones_like(x[..., :1])
    torch.add(m, 1.5, out=m)
    return m


def by_position(x: Tensor) -> Tensor:
    m = torch.ones_like(x[..., :1]) - 4.0
    F.relu6(m, True)
    return m


def from_before(x: Tensor) -> Tensor:
    m = torch.zeros_like(x[..., :1])
    m[:, 1:] = x[:, :-1, :1].detach()
    return m


WRITES = [by_item, by_method, by_view, by_out, by_position, from_before]


class Model(nn.Module):
    """An FFN without adapters, whose hidden state or output meets a factor per token that is
    written in place; a dense linear; a head."""

    def __init__(self, written: Callable[[Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(oracle.VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, oracle.VOCABULARY)
        for linear in (self.up, self.down, self.last):
            linear.requires_grad_(False)
        self.written, self.inside = written, inside

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x = self.embedding(input_ids)
        factor = self.written(x)
        h = F.gelu(self.up(x))
        y = self.down(h * factor) if self.inside else self.down(h) * factor
        x = self.last(x + y)
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels[:, 1:].flatten()))


def places() -> list[Any]:
    """Each write in one place, the first one in both; the rest are slow."""
    return [
        (write, inside) if n == 0 or inside == bool(n % 2) else slow(write, inside)
        for n, write in enumerate(WRITES)
        for inside in (True, False)
    ]


@pytest.mark.parametrize(("written", "inside"), places())
@pytest.mark.parametrize("padding", [slow(0), 4])
def test_reads_stay_behind_writes(
    written: Callable[[Tensor], Tensor], padding: int, inside: bool
) -> None:
    model = Model(written, inside).double().train()
    data = ragged() if padding else oracle.batch(padding=0)
    got = oracle.run_compiled(model, data, PLAN, shift=True)
    assert set(got.record.sites) == {"up", "down"}
    with_padding_dense = predicting(data) | (data["attention_mask"] == 0)
    by_token(model, got.record, with_padding_dense, "dense")
    oracle.assert_close(got, oracle.step(model, data), 1e-9)


def graph_of(function: Callable[[Tensor], Tensor]) -> fx.Graph:
    held: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        held.append(gm.graph)
        return gm.forward

    torch.compile(function, backend=keep)(torch.randn(2, 13, 6))
    return held[0]


@pytest.mark.parametrize("written", WRITES)
def test_written_memory_is_known_by_all_its_names(written: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(lambda x: x.neg() * written(x))
    product = next(n for n in reversed(graph.nodes) if n.op == "call_function")
    assert any(map(changes_input, graph.nodes))
    assert [is_mutated(node) for node in product.all_input_nodes] == [False, True]
    assert not is_mutated(product)


def test_memory_that_is_read_alone_is_not_changed() -> None:
    graph = graph_of(lambda x: F.relu6(x[:, 1:].mul(2.0), False) + x[:, :-1])
    assert not any(map(is_mutated, graph.nodes))


def test_labels_that_are_written_are_not_the_batch_s() -> None:
    class Masking(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            labels = labels.clone()
            labels[:, :4] = input_ids[:, :4]
            return super().forward(input_ids, attention_mask, labels)

    model = Masking(by_item, True).double().train()
    data = ragged(left=True)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, tokens="all")
    got = oracle.run_compiled(model, data, plan)
    with oracle.masked_reference(model, got.record):
        expected = oracle.step(model, data)
    oracle.assert_close(got, expected, 1e-9)
