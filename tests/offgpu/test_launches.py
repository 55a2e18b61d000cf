"""Counting launches off GPU: what is a launch, and that a block can be counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import launches

pytestmark = pytest.mark.offgpu

CODE = """
class Runner:
    def call(self, args):
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((8, 8), (8, 1), torch.bfloat16)
            stream0 = get_raw_stream(0)
            triton_poi_fused_mul_0.run(arg0, buf0, 64, stream=stream0)
            extern_kernels.mm(buf0, reinterpret_tensor(arg1, (8, 8), (1, 8), 0), out=buf1)
            buf2 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf1, buf1, buf1)
            buf3 = buf2[0]
            assert_size_stride(buf3, (8, 8), (8, 1), 'torch.ops.aten.topk.default')
            extern_kernels.mm(buf3, arg1, out=buf1)
            del buf0
            triton_poi_fused_mul_0.run(arg0, buf3, 64, stream=stream0)
        return (buf3, )
triton_poi_fused_mul_0 = async_compile.triton('triton_poi_fused_mul_0', '''...''')
"""


def test_every_launching_call_counts_each_time() -> None:
    assert dict(launches.launches(CODE)) == {
        "triton_poi_fused_mul_0": 2,
        "extern_kernels.mm": 2,
        "torch.ops.aten._scaled_dot_product_flash_attention": 1,
    }


def test_the_cases_are_those_of_the_committed_table() -> None:
    path = Path(launches.__file__).parent / "results" / "launches.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in found["cases"]] == [case.name for case in launches.CASES]
    for row in found["cases"]:
        assert row["sparse"] > 20 and row["dense"] > 20
        assert row["ratio"] == pytest.approx(row["sparse"] / row["dense"], abs=1e-3)
    assert found["worst_ratio"] == max(row["ratio"] for row in found["cases"]) <= 1.25


@pytest.mark.slow
def test_a_small_block_is_counted() -> None:
    shape = {
        **launches.SHAPE, "hidden_size": 256, "intermediate_size": 1024,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128,
    }  # fmt: skip
    case = launches.Case("qkvo", autocast=False)
    found = launches.run([case], shape, (2, 64, 16))
    (row,) = found["cases"]
    # seven frozen matmuls and 4 x 2 of adapters forward; their gradients backward
    assert row["dense_parts"]["forward"] >= 15 and row["dense_parts"]["backward"] >= 20
    # beside them seven frozen matmuls of the other token list, and the choices
    assert row["sparse_parts"]["forward"] >= 20 and row["sparse_parts"]["backward"] >= 20
    assert found["worst_ratio"] == row["ratio"]
