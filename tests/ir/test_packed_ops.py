"""Products with packed weights: their values, gradients and rules for tracing."""

import pytest
import torch
from torch import Tensor

from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL, COLUMNS, ROWS
from sparselora_fx.model.unpacking import Layout

N, K = 24, 40


def packed() -> tuple[Tensor, list[Tensor], str, Tensor]:
    stored, scales = torch.randint(-128, 128, (N, K)).to(torch.int8), torch.rand(N, 1) + 0.5
    return stored, [scales], Layout("scaled", N, K, K).encode(), stored * scales


def case(of: int) -> tuple[Tensor | None, Tensor]:
    """An index, and an input that needs a gradient."""
    idx = {ROWS: torch.tensor([1, 5, 23]), COLUMNS: torch.tensor([0, 7, 8, 39]), ALL: None}[of]
    x = torch.randn(2, 5, 4 if of == COLUMNS else K, dtype=torch.float64, requires_grad=True)
    return idx, x


@pytest.mark.parametrize("of", [ROWS, COLUMNS, ALL])
def test_values_and_gradients_are_those_of_the_slice(of: int) -> None:
    torch.manual_seed(of + 2)
    stored, held, layout, whole = packed()
    idx, x = case(of)
    matrix = whole.double()
    part = matrix if idx is None else matrix[idx] if of == ROWS else matrix[:, idx]
    got = OPS.packed_linear(x, stored, held, layout, idx, of)
    expected = x @ part.t()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gy = torch.randn_like(got)
    (gx,) = torch.autograd.grad(got, x, gy)
    torch.testing.assert_close(gx, gy @ part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", [ROWS, COLUMNS, ALL])
def test_rules_for_tracing(of: int) -> None:
    torch.manual_seed(of + 2)
    stored, held, layout, _ = packed()
    idx, x = case(of)
    torch.library.opcheck(OPS.packed_linear.default, (x, stored, held, layout, idx, of))
    if of == ALL:
        torch.library.opcheck(OPS.unpack.default, (stored, held, layout, torch.float64))


def test_nothing_unpacked_is_saved_for_the_backward() -> None:
    stored, held, layout, _ = packed()
    idx, x = case(ROWS)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPS.packed_linear(x, stored, held, layout, idx, ROWS)
    assert sorted(t.numel() for t in saved) == [3, N, N * K]  # idx, scales, packed elements
    assert all(not t.is_floating_point() or t.numel() == N for t in saved)


def test_an_index_that_does_not_fit_is_refused() -> None:
    stored, held, layout, _ = packed()
    x = torch.randn(3, K)
    with pytest.raises(IndexError, match="out of range for 24"):
        OPS.packed_linear(x, stored, held, layout, torch.tensor([24]), ROWS)
    with pytest.raises(ValueError, match="has 40 channels, but 2 are multiplied"):
        OPS.packed_linear(x, stored, held, layout, torch.tensor([0, 39]), COLUMNS)
