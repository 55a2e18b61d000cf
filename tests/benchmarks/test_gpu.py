"""The GPU benchmark without a GPU: its regions compute what they claim, its tables are complete."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.support import gpu_regions
from benchmarks.support.gpu_regions import Shape
from sparselora_fx.lowering import measured

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


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of few channels, and a clock that stands for the GPU's: each call takes 2 ms, one
    through the picked tile 1 ms."""

    def clock(fn: Any) -> float:
        fn()
        call = fn.func if isinstance(fn, partial) else fn.__defaults__[0]
        return 1.0 if call.__name__ == "picked" else 2.0

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "milliseconds", clock)
    for module in (gpu, gpu_regions):
        monkeypatch.setattr(module, "MODELS", {"small": Shape(48, 192, 8, 4, 32, length=8)})


@pytest.mark.slow
def test_every_kind_of_row_is_measured(on_cpu: None, tmp_path: Path) -> None:
    """All that runs on a GPU, on a CPU: compiled for each kind of choice, and called."""
    ceiling = {"tflops": 1.0, "gigabytes_per_second": 1.0}
    kernels = [row for row in gpu.kernel_cases() if row["tokens"] == 512][:2]
    regions = [row for row in gpu.region_cases() if row["tokens"] == 512][::3]
    assert {row["what"].split()[0] for row in regions} == {"ffn", "attention"}
    for row in kernels:
        gpu.measure_kernel(row, ceiling)
    for row in regions:
        gpu.measure_region(row, ceiling)
    for row in kernels + regions:
        times = {kind: row[f"{kind}_ms"] for kind in gpu.KINDS}
        assert times == {"template": 2.0, "picked": 1.0, "fallback": 2.0, "dense": 2.0}
    path = tmp_path / "measured.json"
    path.write_text('{"another card": []}')
    gpu.update(path, {"hardware": {"gpu": "card"}, "kernels": kernels})
    table = json.loads(path.read_text())
    assert list(table) == ["another card", "card", measured.PROVENANCE]
    names = ("template", "tokens", "outputs", "inner", "ratio")
    kept = kernels[0]["kept"]
    assert [[point[name] for name in names] for point in table["card"]] == [
        ["out_sliced", 512, kept, 48, 0.5],
        ["reduction_sliced", 512, 48, kept, 0.5],
    ]


def test_without_a_measurement_the_table_stays(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(measured.SHIPPED.read_bytes())
    gpu.update(path, {"hardware": {"gpu": gpu.NOT_MEASURED}, "kernels": list(gpu.kernel_cases())})
    assert path.read_bytes() == measured.SHIPPED.read_bytes()
