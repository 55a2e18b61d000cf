"""On a GPU scores are spelled otherwise, and mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from sparselora_fx.ir import score_ops
from sparselora_fx.lowering import score_forms


def arguments(
    tokens: tuple[int, ...], rank: int, dtype: torch.dtype
) -> Iterator[tuple[object, ...]]:
    torch.manual_seed(0)
    z, a = torch.randn(*tokens, rank, dtype=dtype), torch.randn(40, rank, dtype=dtype)
    counted = torch.rand(tokens) < 0.6
    offsets, norms = (None, torch.randn(40, dtype=dtype)), (None, torch.rand(40, dtype=dtype))
    for offset, taken, weights, normalise in product(
        offsets, (None, counted), norms, (False, True)
    ):
        yield z, a, offset, taken, weights, normalise


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(64,), (2, 9), (300,)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_energies(as_on_gpu: None, dtype: torch.dtype, tokens: tuple[int, ...], rank: int) -> None:
    for given in arguments(tokens, rank, dtype):
        got, expected = score_forms.low_rank_energy(*given), score_ops.low_rank_energy(*given)
        assert got.dtype == expected.dtype and bool((expected > 0).any())
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_linear_from_few_ranks(as_on_gpu: None, dtype: torch.dtype) -> None:
    z, a = torch.randn(2, 32, 8, dtype=dtype), torch.randn(40, 8, dtype=dtype)
    got, expected = score_forms.low_rank_linear(z, a), score_ops.low_rank_linear(z, a)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_matmuls_stay_where_tokens_are_many_and_on_a_cpu(as_on_gpu: None) -> None:
    assert not score_forms._few(torch.empty(129, 8), torch.empty(40, 8))
    assert not score_forms._few(torch.empty(64, 17), torch.empty(40, 17))
    assert score_forms._few(torch.empty(2, 64, 16), torch.empty(40, 16))


def test_a_cpu_has_the_op_s_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_forms, "_product", None)
    score_forms.low_rank_linear(torch.randn(4, 8), torch.randn(40, 8))
    score_forms.low_rank_energy(torch.randn(4, 8), torch.randn(40, 8), None, None, None, False)
