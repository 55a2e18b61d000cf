"""Bad arguments of the ops: a clear error in eager, on every op, and no read out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_fx.environment import DEBUG_BOUNDS
from sparselora_fx.ir import checks
from sparselora_fx.ir.ops import OPS

T, K, N = 5, 7, 11


def _call(name: str, idx: Tensor) -> Tensor:
    """The op on random operands that fit idx."""
    kept = idx.shape[0]
    x, w = torch.randn(T, K), torch.randn(N, K)
    calls: dict[str, Callable[[], Tensor]] = {
        "sliced_linear": lambda: OPS.sliced_linear(x, w, idx),
        "sliced_linear_dgrad": lambda: OPS.sliced_linear_dgrad(torch.randn(T, kept), w, idx),
        "sliced_linear_wgrad": lambda: OPS.sliced_linear_wgrad(torch.randn(T, kept), x, idx, N),
        "sliced_linear_in": lambda: OPS.sliced_linear_in(torch.randn(T, kept), w.t(), idx),
        "sliced_linear_in_dgrad": lambda: OPS.sliced_linear_in_dgrad(x, w.t(), idx),
        "sliced_linear_in_wgrad": lambda: OPS.sliced_linear_in_wgrad(
            x, torch.randn(T, kept), idx, N
        ),
        "gather_channels": lambda: OPS.gather_channels(torch.randn(T, N), idx),
        "scatter_channels": lambda: OPS.scatter_channels(torch.randn(T, kept), idx, N),
    }
    return calls[name]()


NAMES = [
    "sliced_linear",
    "sliced_linear_dgrad",
    "sliced_linear_wgrad",
    "sliced_linear_in",
    "sliced_linear_in_dgrad",
    "sliced_linear_in_wgrad",
    "gather_channels",
    "scatter_channels",
]
BAD = [
    pytest.param([0, 3, N], IndexError, f"from 0 to {N}, out of range for {N}", id="too-large"),
    pytest.param([-1, 3], IndexError, "from -1 to 3", id="negative"),
    pytest.param([4, 2, 4], ValueError, "channel 4 twice", id="duplicate"),
    pytest.param([], ValueError, "at least one channel", id="empty"),
]


@pytest.mark.parametrize("name", NAMES)
def test_good_index_in_any_order(name: str) -> None:
    assert torch.isfinite(_call(name, torch.tensor([6, 0, 3]))).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("idx", "error", "words"), BAD)
def test_bad_index(name: str, idx: list[int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _call(name, torch.tensor(idx, dtype=torch.int64))


@pytest.mark.parametrize("name", NAMES)
def test_index_of_another_dtype(name: str) -> None:
    with pytest.raises(TypeError, match=r"int64, got torch.int32.*long"):
        _call(name, torch.tensor([1, 2], dtype=torch.int32))


@pytest.mark.parametrize(
    "check",
    [checks.out_sliced, checks.out_sliced_dgrad, checks.in_sliced, checks.in_sliced_dgrad],
)
def test_mixed_devices(check: Callable[..., None]) -> None:
    """`meta` stands for a second device; an op called with one would never reach its body."""
    near, far, idx = torch.randn(T, K), torch.randn(N, K, device="meta"), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"operands are on cpu and meta; move them"):
        check(near, far, idx)


@pytest.mark.parametrize(
    "arguments",
    [(checks.gather,), (checks.scatter, N), (checks.wgrad, N)],
    ids=lambda a: a[0].__name__,
)
def test_mixed_devices_of_an_index(arguments: tuple[Any, ...]) -> None:
    check, *rest = arguments
    operands = [torch.randn(T, 2)] * (2 if check is checks.wgrad else 1)
    with pytest.raises(ValueError, match="cpu and meta"):
        check(*operands, torch.zeros(2, dtype=torch.int64, device="meta"), *rest)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.randn(T, K + 1), torch.randn(N, K), torch.tensor([1])), "8 channels, but 7"),
        ((torch.randn(T, K), torch.randn(N, K), torch.tensor([[1]])), "one dimension"),
    ],
)
def test_shapes_that_do_not_fit(arguments: tuple[Any, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        OPS.sliced_linear(*arguments)


def test_integer_operands() -> None:
    with pytest.raises(TypeError, match="floating point"):
        OPS.sliced_linear(torch.ones(T, K).long(), torch.ones(N, K).long(), torch.tensor([1]))


@pytest.mark.parametrize("k", [0, N + 1])
def test_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} channels of {N}"):
        OPS.topk_channels(torch.rand(N), k)


def test_operands_that_are_not_contiguous() -> None:
    """x with strides that no kernel expects gives what its contiguous copy gives."""
    x, w, idx = torch.randn(K, T, dtype=torch.float64).t(), torch.randn(N, K).double(), [1, 4]
    got = OPS.sliced_linear(x, w, torch.tensor(idx))
    torch.testing.assert_close(got, x.contiguous() @ w[idx].t(), rtol=1e-14, atol=0)


def test_weights_of_another_floating_dtype_are_cast() -> None:
    x, w = torch.randn(T, K), torch.randn(N, K).bfloat16()
    assert OPS.sliced_linear(x, w, torch.tensor([2])).dtype == torch.float32


@pytest.mark.parametrize("asked", [False, True])
def test_values_on_a_gpu_are_looked_at_when_asked(
    monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """`meta` stands for a device whose values are far away: reading one there is an error."""
    monkeypatch.setenv(DEBUG_BOUNDS, str(int(asked)))
    idx = torch.zeros(3, dtype=torch.int64, device="meta")
    if asked:
        with pytest.raises((RuntimeError, NotImplementedError)):
            checks.index(idx, N)
    else:
        checks.index(idx, N)
