"""Parts of a step that run without gradients, and again in the backward: dense, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.labelled_models import plan_of

REASON = "without gradients inside a training step"


class Again(torch.autograd.Function):
    """Runs a block without gradients, and once more in the backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.block(x).backward(gradient)
        return x.grad, None


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64).requires_grad_(False), nn.Linear(64, 16)
        self.down.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(4, 16) / 4)
        self.lora_B = nn.Parameter(torch.randn(64, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) + (x @ self.lora_A.t()) @ self.lora_B.t()
        return x + self.down(torch.relu(h))


class Net(nn.Module):
    """One feed-forward that runs again, or under ``no_grad``, and one that does not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.start = nn.Parameter(torch.randn(16))
        self.mlp, self.other_mlp = FeedForward(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.start
        if self.kind == "frozen":
            with torch.no_grad():
                first = self.mlp(x)
        elif torch.compiler.is_compiling():
            torch._dynamo.graph_break()
            first = Again.apply(x, self.mlp)
        else:
            first = Again.apply(x, self.mlp)
        return self.other_mlp(first + x)


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["again", "frozen"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dense_with_the_reason_and_right(kind: str, backend: str) -> None:
    """The part without gradients is dense; the other is sliced; gradients are masked-dense."""
    net, x = Net(kind).double().train(), torch.randn(2, 5, 16, dtype=torch.float64)
    slx.compile(net, oracle.estimator_of(net), plan=plan_of(0.5), backend=backend)
    with slx.record(net) as record:
        got = gradients(net, x)
    lines = {line.split()[0]: line for line in slx.explain(net, verbose=True).splitlines()}
    assert REASON in lines["mlp.up"] and REASON in lines["mlp.down"]
    assert set(record.sites) == {"other_mlp.up", "other_mlp.down"}
    slx.restore(net)
    with oracle.masked_reference(net, record):
        expected = gradients(net, x)
    assert got.keys() == expected.keys()
    assert all(oracle.difference(got[n], expected[n]) < 1e-12 for n in got)


def test_a_call_without_gradients_is_dense() -> None:
    """A forward in training mode that began without gradients trains nothing: a reference, a
    teacher."""
    net, x = Net("frozen").double().train(), torch.randn(2, 5, 16, dtype=torch.float64)
    expected = net(x)
    slx.compile(net, oracle.estimator_of(net), plan=plan_of(0.5), backend="eager")
    with slx.record(net) as record, torch.no_grad():
        got = net(x)
    assert record.sites == {} and oracle.difference(got, expected.detach()) < 1e-12
