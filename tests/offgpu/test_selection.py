"""The kernel that chooses channels, lowered as for a GPU and run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_fx.ir import joint_ops  # noqa: F401 - defines `topk_rows`
from sparselora_fx.ir.ops import OPS
from tests.support.offgpu_backend import FakeGPU

pytestmark = pytest.mark.offgpu
INFINITE, NAN = float("inf"), float("nan")


def on_card(function: object, *inputs: Tensor) -> tuple[object, FakeGPU]:
    torch.compiler.reset()
    gpu = FakeGPU(choice="unmeasured")
    with torch.no_grad():
        return torch.compile(function, backend=gpu)(*inputs), gpu  # type: ignore[call-overload]


def distinct(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers of both signs, no two alike."""
    patterns = (torch.randperm(count) + 12000).to(torch.int16)
    numbers = patterns.view(dtype) if dtype.itemsize == 2 else torch.randperm(count) / 7
    return (numbers * (torch.randint(2, (count,)) * 2 - 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (16, 16), (37, 5), (64, 63), (1000, 144)])
def test_the_largest_ascending(channels: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    scores = torch.stack([distinct(channels, dtype) for _ in range(3)])
    got, gpu = on_card(lambda rows: OPS.topk_rows(rows, k), scores)
    assert [name.startswith("triton_tem_") for name, _ in gpu.kernels] == [True]
    assert torch.equal(got, OPS.topk_rows(scores, k))


SPECIAL = {
    "all equal": ([0.5] * 7, [0, 1, 2]),
    "equal at the bound": ([1.0, 3.0, 1.0, 2.0, 1.0], [0, 1, 3]),
    "both zeros": ([-1.0, 0.0, -0.0, 5.0, -2.0], [1, 2, 3]),
    "not a number": ([1.0, NAN, 2.0, INFINITE, -NAN, 3.0], [1, 3, 4]),
    "infinite": ([-INFINITE, -INFINITE, INFINITE, -INFINITE, 0.0], [0, 2, 4]),
    "tiny": ([1e-45, 0.0, -1e-45, 3e-45, 2e-45], [0, 3, 4]),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_equal_and_special_scores(case: str) -> None:
    scores, expected = SPECIAL[case]
    got, _ = on_card(lambda row: OPS.topk_channels(row, 3), torch.tensor(scores))
    assert got.tolist() == expected  # type: ignore[attr-defined]


def test_what_scores_are_made_of_is_computed_in_the_kernel() -> None:
    """And two choices are one kernel, with what is read off them beside it."""

    def chosen(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = OPS.topk_channels(s * 2 + 1, 8), OPS.topk_channels(t.square(), 8)
        return first, second, OPS.scatter_channels(s[first][None], first, s.shape[0])

    torch.manual_seed(0)
    inputs = torch.randn(40), torch.randn(40)
    got, gpu = on_card(chosen, *inputs)
    for one, other in zip(got, chosen(*inputs), strict=True):  # type: ignore[call-overload]
        assert torch.equal(one, other)
    assert sum(name.startswith("triton_tem_") for name, _ in gpu.kernels) == 1


@pytest.mark.parametrize(
    "scores",
    [torch.randn(24, dtype=torch.float64), torch.randn(32769)],
    ids=["float64", "more than a program holds"],
)
def test_other_scores_are_selected_and_sorted(scores: Tensor) -> None:
    torch.compiler.reset()
    gpu = FakeGPU(choice="unmeasured", execute=False)
    with torch.no_grad():
        torch.compile(lambda row: OPS.topk_channels(row, 8), backend=gpu)(scores)
    ((_, code),) = gpu.codes
    assert "aten.topk" in code and not any("triton_tem_" in name for name, _ in gpu.kernels)
