"""What tests share: adapted nets."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle

WIDTH, HIDDEN = 24, 40


class Adapted(nn.Module):
    """A frozen linear with a hand-written low-rank branch."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(3, inputs) * 0.2)
        self.up = nn.Parameter(torch.randn(outputs, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Net(nn.Module):
    """Two in-projections and an out-projection; ``body`` says how they meet."""

    def __init__(self, body: Callable[[Any, Tensor], Any], inner: int = HIDDEN) -> None:
        super().__init__()
        self.a = Adapted(WIDTH, HIDDEN)
        self.b = Adapted(WIDTH, HIDDEN)
        self.out = Adapted(inner, WIDTH)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = make().to(torch.float64).train()
    return model, torch.randn(2, 7, WIDTH, dtype=torch.float64)


def loss_of(output: Any) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return sum((o * torch.linspace(-1, 1, o.shape[-1]).to(o)).square().mean() for o in outputs)


def step(model: nn.Module, x: Tensor) -> oracle.Step:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    x = x.clone().requires_grad_()  # so that the gradient through the frozen weights counts
    loss = loss_of(model(x))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gradients["x"] = x.grad
    return oracle.Step(loss.detach(), gradients)


def check(
    make: Callable[[], nn.Module], sparsity: float = 0.6, backend: str = "eager"
) -> tuple[slx.Recording, str]:
    """Compiled equals masked eager; returns what was recorded and what `explain` said."""
    model, x = build(make)
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(sparsity), backend=backend)
    with slx.record(model) as record:
        got = step(model, x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    with oracle.masked_reference(model, record):
        expected = step(model, x)
    oracle.assert_close(got, expected, 1e-9)
    return record, table


def reasons(table: str) -> dict[str, str]:
    """Frozen linear -> why it is dense, from the table of `explain`."""
    rows = [line.split() for line in table.splitlines()[1:-1]]
    lines = {row[0]: line for row, line in zip(rows, table.splitlines()[1:-1], strict=True)}
    return {n: t.partition("dense: ")[2] for n, t in lines.items() if "dense: " in t}


def plain(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x)) * net.b(x))
