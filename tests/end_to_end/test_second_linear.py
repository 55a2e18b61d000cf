"""A second frozen linear beside a first one is no LoRA branch of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import HIDDEN, WIDTH, Adapted, Net, build, check, reasons, step


class Consumers(nn.Module):
    """``up`` feeds two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Adapted(WIDTH, HIDDEN)
        self.first, self.second = Adapted(HIDDEN, WIDTH), Adapted(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.up(x))
        return self.first(h) + self.second(h.tanh())


@pytest.mark.parametrize("branch", ["dense", "sparse"])
def test_a_linear_that_the_plan_keeps_dense_is_no_branch(branch: str) -> None:
    """It reads the hidden state whole, so nothing may be cut from that."""
    model, x = build(Consumers)
    expected = step(model, x)
    plan = oracle.plan_of({"up": 0.5, "first": 0.5})
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", lora_branch=branch)
    with slx.record(model) as record:
        got = step(model, x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert record.sites == {}, table
    assert "also read by linear" in reasons(table)["up.base"], table
    oracle.assert_close(got, expected, 1e-12)


def summed(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x) + net.b(x)))


def summed_in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y += net.b(x)
    return net.out(F.silu(y))


@pytest.mark.parametrize("body", [summed, summed_in_place])
def test_two_linears_whose_sum_is_activated_share_a_choice(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert set(record.sites) == {"a.base", "b.base", "out.base"}, table
    assert torch.equal(record.sites["a.base"][1], record.sites["b.base"][1])


def test_a_linear_without_sparsity_in_the_sum_is_computed_whole() -> None:
    model, x = build(lambda: Net(summed))
    expected = step(model, x)
    plan = oracle.plan_of({"a": 0.5, "out": 0.5})
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", lora_branch="sparse")
    with slx.record(model) as record:
        got = step(model, x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert record.sites == {}, table
    oracle.assert_close(got, expected, 1e-12)
