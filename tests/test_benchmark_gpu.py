"""The GPU benchmark without a GPU: its regions compute what they claim, its tables are complete."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_regions
from benchmarks.gpu_regions import Shape

SHAPE = Shape(hidden=48, ffn=192, heads=8, kv_heads=4, head_dim=32, length=9)


def _step(fn: object, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    out = fn(x)  # type: ignore[operator]
    return out, torch.autograd.grad(out, x, cotangent)[0]


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_region_with_masked_weights_is_the_sliced_region(kind: str) -> None:
    """Zero rows of the producers' dense weights, zero columns of the consumer's."""
    torch.manual_seed(0)
    region = gpu_regions.build(kind, SHAPE, 0.5, "cpu", torch.float64)
    weights = region.sliced.args[0]  # type: ignore[attr-defined]
    x = torch.randn(2, SHAPE.length, SHAPE.hidden, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    got = _step(region.sliced, x, cotangent)
    for weight, mask in zip(weights, _masks(kind, region), strict=True):
        weight.mul_(mask)
    expected = _step(region.dense, x, cotangent)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def _masks(kind: str, region: gpu_regions.Region) -> list[Tensor]:
    def mask(channels: Tensor, width: int) -> Tensor:
        return torch.zeros(width, dtype=torch.float64).index_fill_(0, channels, 1)

    if kind == "ffn":
        rows = mask(region.sliced.args[1], SHAPE.ffn)  # type: ignore[attr-defined]
        return [rows[:, None], rows[:, None], rows[None, :]]
    kv = SHAPE.kv_heads * SHAPE.head_dim
    qk, v = (mask(channels, kv) for channels in region.sliced.args[1:3])  # type: ignore[attr-defined]

    def of_heads(channels: Tensor) -> Tensor:
        per_head = channels.view(SHAPE.kv_heads, 1, SHAPE.head_dim)
        return per_head.expand(-1, SHAPE.heads // SHAPE.kv_heads, -1).flatten()

    return [of_heads(qk)[:, None], qk[:, None], v[:, None], of_heads(v)[None, :]]


def test_every_row_is_there_before_a_gpu_fills_it() -> None:
    kernels, regions = list(gpu.kernel_cases()), list(gpu.region_cases())
    assert len(kernels) == 6 * 3 * 6 * 2
    assert {row["what"].split()[0] for row in regions} == {"ffn", "attention"}
    for row in kernels + regions:
        assert row["kept"] > 0 and row["kept"] % 64 == 0
        assert row["template_ms"] == gpu.NOT_MEASURED
