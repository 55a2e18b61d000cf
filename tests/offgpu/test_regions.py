"""Whole regions, forward and backward: lowered as for a GPU, run by Triton's interpreter, against
float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.support import gpu_regions
from tests.support.offgpu_backend import FakeGPU

pytestmark = pytest.mark.offgpu
F32, BF16 = torch.float32, torch.bfloat16
slow = pytest.mark.slow


class Case(NamedTuple):
    lead: tuple[int, ...]  # token dimensions
    k: int
    n: int
    kept: int
    dtype: torch.dtype
    choice: str = "template"

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        return f"T{lead}-K{self.k}-N{self.n}-S{self.kept}-{str(self.dtype)[6:]}-{self.choice}"


FFN = [
    Case((70,), 96, 160, 48, F32),
    Case((2, 35), 96, 160, 48, BF16),
    Case((37,), 72, 136, 16, BF16),  # nothing is a multiple of a block
    Case((1,), 64, 128, 64, F32),  # one token
    Case((70,), 96, 160, 48, F32, "fallback"),
    Case((2, 35), 96, 160, 48, BF16, "fallback"),
    Case((70,), 96, 160, 48, BF16, "picked"),
    Case((2, 35), 96, 160, 48, BF16, "slower"),
    Case((2, 35), 96, 160, 48, BF16, "unmeasured"),
    *(
        pytest.param(Case(lead, 72, 136, kept, dtype), marks=slow)
        for lead in ((1,), (65,), (3, 43))
        for kept in (16, 32, 128, 136)
        for dtype in (F32, BF16)
    ),
    pytest.param(Case((33,), 40, 88, 17, F32), marks=slow),  # kept channels no multiple of 16
]
# Its Inductor does not fuse through the reshape of a batched input: right numbers, more kernels.
TORCH_211 = torch.__version__.startswith("2.11.")
ATTENTION = [
    pytest.param(Case((2, 19), 48, 64, 32, F32), marks=slow),
    Case((2, 19), 48, 64, 16, BF16),
    Case((2, 19), 48, 64, 32, BF16, "picked"),
    Case((3, 43), 40, 96, 48, BF16, "picked"),
    Case((2, 19), 48, 64, 32, BF16, "fallback"),
    *(
        pytest.param(Case(lead, 40, 96, kept, dtype, choice), marks=slow)
        for lead in ((1, 1), (3, 21))
        for kept in (16, 96)
        for dtype in (F32, BF16)
        for choice in ("template", "fallback")
    ),
]


@pytest.mark.parametrize("case", FFN, ids=str)
def test_ffn(case: Case) -> None:
    torch.manual_seed(0)
    gpu = FakeGPU(choice=case.choice)
    inputs = gpu_regions.ffn_inputs(case.lead, case.k, case.n, case.kept, case.dtype)
    compiled = torch.compile(gpu_regions.ffn, backend=gpu)
    gpu_regions.assert_as_exact_as_eager(gpu_regions.ffn, compiled, inputs)
    if case.choice == "template" and not (TORCH_211 and len(case.lead) > 1):
        assert_only_templates(gpu, forward=3, backward=3)
    if case.choice == "fallback":
        assert len(gpu.choices) == 6 and all("fallback" in choice for choice in gpu.choices)
    templates = sum("triton_tem_" in name for name, _ in gpu.kernels)
    # Two projections, and one for both back: the columns of the third weight are not contiguous.
    assert templates == {"picked": 3, "slower": 0, "unmeasured": 0}.get(case.choice, templates)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: Case) -> None:
    torch.manual_seed(0)
    gpu = FakeGPU(choice=case.choice)
    inputs = gpu_regions.attention_inputs(case.lead, case.k, case.n, case.kept, case.dtype)
    compiled = torch.compile(gpu_regions.attention, backend=gpu)
    gpu_regions.assert_as_exact_as_eager(gpu_regions.attention, compiled, inputs)
    if case.choice == "picked":  # one for three projections, and one for their gradients' sum
        templates = [n for n, _ in gpu.kernels if n.startswith("triton_tem_")]
        assert len(templates) == 2, templates
        return
    wanted = "triton_sparselora" if case.choice == "template" else "fallback"
    ours = [choice for choice in gpu.choices if "sliced_linear" in choice.split(":")[0]]
    assert len(ours) == 8 and all(wanted in choice for choice in ours)


@pytest.mark.parametrize("choice", ["template", pytest.param("fallback", marks=slow)])
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=slow)], ids=str)
def test_one_graph_serves_every_token_count(choice: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gpu = FakeGPU(choice=choice)
    compiled = torch.compile(gpu_regions.ffn, backend=gpu)
    for tokens in (70, 37, 129):
        inputs = gpu_regions.ffn_inputs((tokens,), 72, 136, 48, dtype)
        for position in (0, 5):
            torch._dynamo.mark_dynamic(inputs[position], 0)
        gpu_regions.assert_as_exact_as_eager(gpu_regions.ffn, compiled, inputs)
    assert [is_backward for is_backward, _ in gpu.codes] == [False, True]


@slow
def test_attention_with_a_dynamic_length() -> None:
    torch.manual_seed(0)
    gpu = FakeGPU()
    compiled = torch.compile(gpu_regions.attention, backend=gpu)
    for length in (19, 33):
        inputs = gpu_regions.attention_inputs((2, length), 48, 64, 32, F32)
        for position in (0, 7):
            torch._dynamo.mark_dynamic(inputs[position], 1)
        gpu_regions.assert_as_exact_as_eager(gpu_regions.attention, compiled, inputs)
    assert len(gpu.codes) == 2


@slow
@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 256), (128, 128), (128, 64), (64, 128), (32, 64), (16, 64)]
)
def test_every_tile(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    gpu = FakeGPU(tile=f"BLOCK_M={rows}, BLOCK_N={columns}")
    inputs = gpu_regions.ffn_inputs((150,), 72, 300, 144, BF16)
    compiled = torch.compile(gpu_regions.ffn, backend=gpu)
    gpu_regions.assert_as_exact_as_eager(gpu_regions.ffn, compiled, inputs)
    assert_only_templates(gpu, forward=3, backward=3)


def assert_only_templates(gpu: FakeGPU, *, forward: int, backward: int) -> None:
    """Pointwise neighbours are in the templates' epilogues: no kernel is left for them."""
    for count, is_backward in ((forward, False), (backward, True)):
        names = gpu.kernel_names(backward=is_backward)
        assert len(names) == count and all(name.startswith("triton_tem_") for name in names), names
