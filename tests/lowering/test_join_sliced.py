"""Sums of sliced gradients are one op, and so are sliced matmuls of one input that are alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparselora_fx import environment
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.join_sliced import join_sliced

pytestmark = pytest.mark.usefixtures("as_on_gpu")

F64 = torch.float64
Function = Callable[..., tuple[Tensor, ...]]
DGRAD, LINEAR = OPS.sliced_linear_dgrad, OPS.sliced_linear


def given() -> tuple[Tensor, ...]:
    """x or gy ``[T, 8]``, three weights ``[10, 8]``, three indices of four rows."""
    torch.manual_seed(0)
    weights = [torch.randn(10, 8, dtype=F64) for _ in range(3)]
    indices = [torch.randperm(10)[:4].sort().values for _ in range(3)]
    return (torch.randn(6, 8, dtype=F64), *weights, *indices)


def joined(function: Function) -> tuple[int, fx.GraphModule]:
    """How many matmuls were joined, and the graph, whose results are compared."""
    gm = make_fx(function, tracing_mode="symbolic")(*given())
    count = join_sliced(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(*given()), function(*given()), strict=True):
        torch.testing.assert_close(got, expected)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return count, gm


def calls(gm: fx.GraphModule, name: str) -> int:
    target = getattr(OPS, name).default
    return len(gm.graph.find_nodes(op="call_function", target=target))


def test_a_sum_of_three_is_one() -> None:
    def summed(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
        parts = [
            DGRAD(x[:, :4] * n, w, j) for n, (w, j) in enumerate(zip((a, b, c), i, strict=True), 1)
        ]
        return (parts[0] + parts[1] + parts[2],)

    count, gm = joined(summed)
    assert count == 3 and calls(gm, "sliced_linear_dgrads") == 1
    assert not calls(gm, "sliced_linear_dgrad")


@pytest.mark.parametrize("scaled", [False, True], ids=["read twice", "one is scaled"])
def test_sums_that_stay(scaled: bool) -> None:
    def summed(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
        first, second = DGRAD(x[:, :4], a, i[0]), DGRAD(x[:, 4:], b, i[1])
        if scaled:
            return (torch.add(first, second, alpha=2),)
        return first + second, first.sin()

    assert joined(summed)[0] == 0


def test_products_of_one_input_are_one() -> None:
    def products(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
        early = LINEAR(x, a, i[0])
        return early.sum(1), LINEAR(x, b, i[1].sort().values), LINEAR(x, c, i[2])

    count, gm = joined(products)
    assert count == 3 and calls(gm, "sliced_linears") == 1 and not calls(gm, "sliced_linear")


def meeting(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    return (torch.sigmoid(LINEAR(x, a, i[0])) * LINEAR(x, b, i[1]),)


def other_input(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    return LINEAR(x, a, i[0]), LINEAR(x.cos(), b, i[1])


def other_count(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    return LINEAR(x, a, i[0]), LINEAR(x, b, i[1][:3])


def other_layout(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    return LINEAR(x, a, i[0]), LINEAR(x, b.t().contiguous().t(), i[1])


def other_dtype(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    return LINEAR(x, a, i[0]), LINEAR(x, b.float(), i[1])


def waiting(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
    first = LINEAR(x, a, i[0])
    return first, LINEAR(x, b, first.sum(0).argsort())


NEAR_MISSES = [meeting, other_input, other_count, other_layout, other_dtype, waiting]


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda function: function.__name__)
def test_products_that_stay(function: Function) -> None:
    count, gm = joined(function)
    assert count == 0 and calls(gm, "sliced_linear") == 2


def test_other_devices_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "shares_launches", lambda device: device == "cuda")

    def both(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *i: Tensor) -> tuple[Tensor, ...]:
        total = DGRAD(x[:, :4], a, i[0]) + DGRAD(x[:, 4:], b, i[1])
        return total, LINEAR(x, a, i[0]), LINEAR(x, b, i[1])

    assert joined(both)[0] == 0
