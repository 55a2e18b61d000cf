"""Ops that stand for several sliced matmuls mean just that, for values and for shapes."""

from __future__ import annotations

import torch

from sparselora_fx.ir import joint_ops  # noqa: F401 - defines the ops
from sparselora_fx.ir.ops import OPS


def test_products_of_one_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    w = [torch.randn(10, 8, dtype=torch.float64) for _ in range(3)]
    idx = [torch.randperm(10)[:4].sort().values for _ in range(3)]
    got = OPS.sliced_linears(x, w, idx)
    for y, weight, rows in zip(got, w, idx, strict=True):
        torch.testing.assert_close(y, x @ weight[rows].t())
    torch.library.opcheck(OPS.sliced_linears.default, (x, w, idx))


def test_a_sum_of_gradients() -> None:
    torch.manual_seed(0)
    kept, sizes = (4, 5, 1), (10, 12, 3)
    gy = [torch.randn(2, 3, count, dtype=torch.float64) for count in kept]
    w = [torch.randn(size, 8, dtype=torch.float64) for size in sizes]
    idx = [
        torch.randperm(size)[:count].sort().values for size, count in zip(sizes, kept, strict=True)
    ]
    expected = sum(g @ weight[rows] for g, weight, rows in zip(gy, w, idx, strict=True))
    torch.testing.assert_close(OPS.sliced_linear_dgrads(gy, w, idx), expected)
    torch.library.opcheck(OPS.sliced_linear_dgrads.default, (gy, w, idx))
