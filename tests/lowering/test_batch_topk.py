"""Independent choices are one selection; those that wait for each other stay two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparselora_fx import environment
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering.batch_topk import batch_topk

pytestmark = pytest.mark.usefixtures("as_on_gpu")

Choosing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def scores() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(20), torch.randn(20), torch.randn(30)


def chosen(score: Tensor, k: int) -> Tensor:
    return OPS.topk_channels(score, k)


def joined(choosing: Choosing) -> tuple[int, fx.GraphModule]:
    """How many selections were joined, and the graph, whose results are compared."""
    gm = make_fx(choosing, tracing_mode="fake")(*scores())
    count = batch_topk(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(*scores()), choosing(*scores()), strict=True):
        assert torch.equal(got, expected)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return count, gm


def selections(gm: fx.GraphModule) -> int:
    ours = (OPS.topk_channels.default, OPS.topk_rows.default)
    return sum(len(gm.graph.find_nodes(op="call_function", target=op)) for op in ours)


def test_alike_ones_are_one_selection() -> None:
    count, gm = joined(lambda s, t, u: (chosen(s.square(), 5), chosen(t + 1, 5)))
    assert count == 2 and selections(gm) == 1


def test_a_reader_may_come_before_the_second() -> None:
    def choosing(s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        first = chosen(s, 5)
        return s[first], chosen(t.exp(), 5), first

    assert joined(choosing)[0] == 2


@pytest.mark.parametrize(
    "choosing",
    [
        lambda s, t, u: (chosen(s, 5), chosen(t, 4)),
        lambda s, t, u: (chosen(s, 5), chosen(u, 5)),
        lambda s, t, u: (chosen(s, 5), chosen(t.double(), 5)),
        lambda s, t, u: (chosen(t + s[chosen(s, 5)].sum(), 5),),
    ],
    ids=["other counts", "other sizes", "other dtypes", "one waits"],
)
def test_near_misses(choosing: Choosing) -> None:
    count, gm = joined(choosing)
    assert count == 0 and selections(gm) in (1, 2)


def test_two_that_wait_for_each_other_s_partner() -> None:
    """Joining both pairs would make a circle."""

    def choosing(s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        a, c = chosen(s, 5), chosen(u, 7)
        b = chosen(t + u[c].sum(), 5)
        d = chosen(u + s[a].sum(), 7)
        return a, b, c, d

    count, gm = joined(choosing)
    assert count == 2 and selections(gm) == 3


def test_layers_after_one_another() -> None:
    def choosing(s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ()
        for _ in range(3):
            pair = chosen(s, 5), chosen(t, 5)
            found += pair
            s, t = s + s[pair[0]].sum(), t - t[pair[1]].mean() * s
        return found

    count, gm = joined(choosing)
    assert count == 6 and selections(gm) == 3


def test_a_cpu_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "shares_launches", lambda device: device == "cuda")
    assert joined(lambda s, t, u: (chosen(s, 5), chosen(t, 5)))[0] == 0
