"""The lowerings on a real GPU (marked gpu), and what the GPU benchmark writes where there is
none."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.model.weight_layout import GatherLayout
from tests.support import gpu_regions

KINDS = ("template", "picked", "fallback", "unmeasured")


@pytest.mark.gpu
@pytest.mark.parametrize("choice", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [16, 48, 136])
def test_ffn_on_a_gpu(choice: str, dtype: torch.dtype, kept: int) -> None:
    torch.manual_seed(0)
    for tokens in (1, 70, 257):
        inputs = on_gpu(gpu_regions.ffn_inputs((tokens,), 72, 136, kept, dtype))
        gpu_regions.assert_as_exact_as_eager(
            gpu_regions.ffn, gpu.compiled(gpu_regions.ffn, choice), inputs
        )


@pytest.mark.gpu
@pytest.mark.parametrize("choice", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_on_a_gpu(choice: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = on_gpu(gpu_regions.attention_inputs((2, 37), 48, 64, 32, dtype))
    gpu_regions.assert_as_exact_as_eager(
        gpu_regions.attention, gpu.compiled(gpu_regions.attention, choice), inputs
    )


@pytest.mark.gpu
def test_layout_of_weights_on_a_gpu_needs_one_layer_more_at_most() -> None:
    model = torch.nn.Module()
    model.mlp = torch.nn.ModuleDict(
        {"up": torch.nn.Linear(1024, 4096), "down": torch.nn.Linear(4096, 1024)}
    )
    model.requires_grad_(False).cuda()
    weight = model.mlp["down"].weight
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layout = GatherLayout()
    assert layout.apply(model, frozen_weights(model)) == 1 and weight.stride() == (1, 1024)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() <= before + weight.nbytes
    layout.restore()
    assert weight.is_contiguous()


@pytest.mark.gpu
@pytest.mark.slow
def test_benchmark_measures_something() -> None:
    found = gpu.run(minutes=0.5)
    assert found["ceilings"]["tflops"] > 0
    assert any(row["template_ms"] != gpu.NOT_MEASURED for row in found["kernels"])


def on_gpu(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [v.detach().cuda().requires_grad_(v.requires_grad) for v in inputs]


def test_without_a_gpu_every_cell_says_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = gpu.run(minutes=1)
    for row in (*found["kernels"], *found["regions"]):
        assert {row[f"{kind}_ms"] for kind in gpu.KINDS} == {gpu.NOT_MEASURED}
        assert "roofline_share" not in row
    lines = gpu.table(found).splitlines()
    cells = [line for line in lines if line.startswith(("| sliced", "| ffn", "| attention"))]
    assert len(cells) == len(found["kernels"]) + len(found["regions"])
    assert all(line.count(gpu.NOT_MEASURED) >= 3 for line in cells)


def test_roofline_counts_each_operand_once() -> None:
    row = {"model": "Llama-3-8B", "tokens": 4096, "kept": 1408}
    ceiling = {"tflops": 1e9, "gigabytes_per_second": 1000.0}
    elements = 4096 * 4096 + 4096 * 1408 + 4096 * 1408
    assert gpu.roofline(row, ceiling) == pytest.approx(2 * elements / 1e9)
    ceiling = {"tflops": 1.0, "gigabytes_per_second": 1e12}
    assert gpu.roofline(row, ceiling) == pytest.approx(2 * 4096 * 4096 * 1408 / 1e9)
