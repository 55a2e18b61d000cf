"""How a weight is stored is read off its use: ``[K, N]`` chooses what ``[N, K]`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import WIDTH, step

Product = Callable[[Tensor, Tensor], Tensor]

STORED_KN: dict[str, Product] = {
    "x @ w": lambda x, w: x @ w,
    "linear(x, w.t())": lambda x, w: F.linear(x, w.t()),
    "linear(x, w.T)": lambda x, w: F.linear(x, w.T),
    "einsum": lambda x, w: torch.einsum("bli,io->blo", x, w),
    "matmul, cast": lambda x, w: torch.matmul(x, w.to(x.dtype)),
    "addmm": lambda x, w: torch.addmm(x.new_zeros(w.shape[1]), x.reshape(-1, x.shape[-1]), w).view(
        *x.shape[:-1], -1
    ),
}


class Kept(nn.Module):
    """A frozen matrix of a layer written by hand, with a low-rank branch."""

    def __init__(self, product: Product, weight: Tensor, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.product = product
        self.down = nn.Parameter(torch.randn(k, 3) * 0.05)
        self.up = nn.Parameter(torch.randn(3, n) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight) + x @ self.down @ self.up


class Gated(nn.Module):
    """A gated feed-forward of three such layers; the rows of a weight differ in size."""

    def __init__(self, product: Product, hidden: int, *, kn: bool) -> None:
        super().__init__()

        def layer(k: int, n: int) -> Kept:
            weight = torch.randn(n, k) * torch.linspace(0.1, 2, n)[torch.randperm(n), None] / k**0.5
            return Kept(product, weight.t().contiguous() if kn else weight, k, n)

        self.a, self.b, self.out = layer(WIDTH, hidden), layer(WIDTH, hidden), layer(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.a(x)) * self.b(x))


def chosen(
    make: Callable[[], nn.Module], score: str | None, masked: Any = None
) -> dict[str, Tensor]:
    """The channels that one step of a full-rank estimator keeps."""
    torch.manual_seed(0)
    model = make().double().train()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    plan = slx.SparsityPlan(0.75, tokens="all", start_step=0, channel_multiple=1, score=score)
    slx.compile(model, oracle.estimator_of(model, 16), plan=plan, backend="eager")
    with slx.record(model) as record:
        got = step(model, x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert len(record.sites) == 3, table
    if masked is not None:
        masked(model, record)
        oracle.assert_close(got, step(model, x), 1e-9)
    return {name: kept for name, (_, kept) in record.sites.items()}


def mask_kn(model: nn.Module, record: slx.Recording) -> None:
    for name, (role, kept) in record.sites.items():
        weight = model.get_submodule(name).weight
        mask = torch.zeros(weight.shape[1 if role == "out" else 0]).index_fill_(0, kept, 1)
        weight.data *= mask if role == "out" else mask[:, None]


CASES = [("x @ w", WIDTH, "pooled"), ("x @ w", 40, None), ("x @ w", 40, "pooled")]
CASES += [(name, WIDTH, None) for name in STORED_KN]


@pytest.mark.parametrize(("product", "hidden", "score"), CASES)
def test_the_choice_is_that_of_the_same_function_stored_nk(
    product: str, hidden: int, score: str | None
) -> None:
    usual = chosen(lambda: Gated(F.linear, hidden, kn=False), score)
    other = chosen(lambda: Gated(STORED_KN[product], hidden, kn=True), score, mask_kn)
    assert all(torch.equal(usual[name], other[name]) for name in usual), (usual, other)


@pytest.mark.parametrize("hidden", [WIDTH, 40])
@pytest.mark.parametrize("product", list(STORED_KN))
def test_calibration_finds_what_it_finds_of_the_same_function_stored_nk(
    product: str, hidden: int
) -> None:
    data = [{"x": torch.randn(4, 9, WIDTH, dtype=torch.float64) * torch.rand(WIDTH)}]
    built = {}
    for name, function in (("usual", F.linear), ("other", STORED_KN[product])):
        torch.manual_seed(0)
        model = Gated(function, hidden, kn=name == "other").double().train()
        built[name] = slx.SVDEstimator.build(model, rank=4, calibration=data, progress=False)
        built[name].check(model)
    for layer in ("a", "b", "out"):
        usual, other = (built[name].factors[layer] for name in built)
        if layer != "out":  # whose channels are not chosen: a plain SVD, by a random sketch
            assert torch.allclose(usual.a @ usual.b, (other.a @ other.b).t(), atol=1e-9), layer
        known = zip(*(built[name].statistics[layer] for name in built), strict=True)
        assert all(torch.allclose(*pair, atol=1e-9) for pair in known), layer


def test_the_dense_phase_finds_what_it_finds_of_the_same_function_stored_nk() -> None:
    kept = {}
    for name, function in (("usual", F.linear), ("other", lambda x, w: x @ w)):
        torch.manual_seed(0)
        model = Gated(function, WIDTH, kn=name == "other").double().train()
        plan = slx.SparsityPlan(0.75, tokens="all", start_step=2, channel_multiple=1)
        slx.compile(model, plan=plan, backend="eager")
        for number in range(3):
            slx.step(model, number, 4)
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(8, 9, WIDTH, dtype=torch.float64, generator=generator)
            with slx.record(model) as record:
                step(model, x)
        kept[name] = {site: channels for site, (_, channels) in record.sites.items()}
        slx.restore(model)
    assert len(kept["usual"]) == 3
    assert all(torch.equal(kept["usual"][site], kept["other"][site]) for site in kept["usual"])
