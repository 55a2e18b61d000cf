"""Single ops lowered as for a GPU: derivatives of weights, mixed types, layouts, fused gathers,
bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparselora_fx.environment import DEBUG_BOUNDS
from sparselora_fx.ir.ops import OPS
from tests.support import gpu_regions
from tests.support.offgpu_backend import FakeGPU

pytestmark = pytest.mark.offgpu


def test_weight_gradients() -> None:
    """A LoRA matrix that is sliced trains: both weight gradients, of rows and of columns."""

    def branch(x: Tensor, b: Tensor, a: Tensor, idx: Tensor) -> Tensor:
        return OPS.sliced_linear_in(F.silu(OPS.sliced_linear(x, b, idx)), a, idx)

    torch.manual_seed(0)
    x, b, a = torch.randn(2, 19, 8), torch.randn(72, 8), torch.randn(24, 72)
    inputs = [x.requires_grad_(), b.requires_grad_(), a.requires_grad_(), gpu_regions.kept(72, 16)]
    gpu = FakeGPU()
    compiled = torch.compile(branch, backend=gpu)
    gpu_regions.assert_as_exact_as_eager(branch, compiled, inputs)
    assert not any("wgrad.default(" in code for _, code in gpu.codes), "ran as an eager fallback"


@pytest.mark.parametrize("layout", ["row-major", "channel-major", "transposed"])
def test_weight_layouts_and_casts(layout: str) -> None:
    """A float32 weight under bf16 activations, in each layout that modules store."""

    def consumer(h: Tensor, w: Tensor, idx: Tensor) -> Tensor:
        return OPS.sliced_linear_in(h, w.t() if layout == "transposed" else w, idx)

    torch.manual_seed(0)
    h, w = torch.randn(21, 32).bfloat16().requires_grad_(), torch.randn(40, 72)
    if layout == "channel-major":
        w = w.t().contiguous().t()
    if layout == "transposed":
        w = w.t().contiguous()
    gpu = FakeGPU()
    compiled = torch.compile(consumer, backend=gpu)
    gpu_regions.assert_as_exact_as_eager(consumer, compiled, [h, w, gpu_regions.kept(72, 32)])
    assert len(gpu.kernels) == 2


def test_token_rows_are_gathered_in_the_kernel() -> None:
    """A selection of token rows in front of a producer is fused into its loads: one kernel, no copy
    of x."""

    def selected(x: Tensor, tokens: Tensor, w: Tensor, idx: Tensor) -> Tensor:
        return OPS.sliced_linear(x.index_select(0, tokens), w, idx)

    torch.manual_seed(0)
    inputs = [
        torch.randn(90, 40),
        gpu_regions.kept(90, 33),
        torch.randn(72, 40),
        gpu_regions.kept(72, 32),
    ]
    gpu = FakeGPU()
    with torch.no_grad():
        got = torch.compile(selected, backend=gpu)(*inputs)
    torch.testing.assert_close(got, selected(*inputs))
    assert len(gpu.kernels) == 1, [name for name, _ in gpu.kernels]


def test_index_out_of_range_is_caught_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_BOUNDS, "1")
    x, w, idx = torch.randn(16, 32), torch.randn(64, 32), torch.arange(16)
    gpu = FakeGPU()
    for op in (OPS.sliced_linear, OPS.sliced_linear_in):
        torch.compiler.reset()
        compiled = torch.compile(lambda a, b, i, op=op: op(a, b, i), backend=gpu)
        a = x[:, :16].contiguous() if op is OPS.sliced_linear_in else x
        b = w.t().contiguous() if op is OPS.sliced_linear_in else w
        torch.testing.assert_close(compiled(a, b, idx), op(a, b, idx))
        with pytest.raises(Exception, match="idx is out of range of w"):
            compiled(a, b, idx + 60)


def test_kernels_hold_no_asserts_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG_BOUNDS, raising=False)
    gpu = FakeGPU()
    compiled = torch.compile(lambda x, w, i: OPS.sliced_linear(x, w, i), backend=gpu)
    compiled(torch.randn(16, 32), torch.randn(64, 32), torch.arange(16))
    assert gpu.kernels and not any("device_assert" in source for _, source in gpu.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch: int) -> None:
    torch.manual_seed(0)
    gpu = FakeGPU(arch=arch)
    inputs = gpu_regions.ffn_inputs((37,), 72, 136, 48, torch.bfloat16)
    gpu_regions.assert_as_exact_as_eager(
        gpu_regions.ffn, torch.compile(gpu_regions.ffn, backend=gpu), inputs
    )


@pytest.mark.parametrize("wide", [0, 1])
def test_a_sum_over_weights_of_two_dtypes(wide: int) -> None:
    """Each is cast to the activations' dtype, whichever comes first."""

    def reads(x: Tensor, a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return OPS.sliced_linear(x, a, i).sin() + OPS.sliced_linear(x, b, j)

    torch.manual_seed(0)
    weights = [torch.randn(72, 40) / 4, torch.randn(72, 40) / 4]
    weights[1 - wide] = weights[1 - wide].bfloat16()
    x = (torch.randn(37, 40) / 4).bfloat16().requires_grad_()
    inputs = [x, *weights, gpu_regions.kept(72, 32), gpu_regions.kept(72, 32)]
    gpu = FakeGPU(choice="picked")
    gpu_regions.assert_as_exact_as_eager(reads, torch.compile(reads, backend=gpu), inputs)
    names = gpu.kernel_names(backward=True)
    assert sum(name.startswith("triton_tem_") for name in names) == 1, names
