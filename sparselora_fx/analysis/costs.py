"""What slicing a region saves in one training step, and what it costs at least.

Saved is the frozen matmuls' work, forward and input gradient, on the channels left out. The cost is
what no shape avoids: the launches that slicing adds, and copying the kept weights. Both in seconds,
from measured constants: a bound, for what cannot pay. A device that is not in the table is not
judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparselora_fx import _torch
from sparselora_fx.analysis.regions import Region, Site
from sparselora_fx.analysis.step_work import GraphWork
from sparselora_fx.graph.nodes import tensor


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        flops: floating-point operations of a large matmul in a second.
        bytes: bytes of gathered rows that are copied in a second.
        region: seconds that slicing one region adds at least.
        op: seconds of calling an op of a compiled step, on average.
        traffic: bytes in a second that ops without FLOPs read and write, counted as if none were
            fused.
        unpacked: elements of quantised weights made plain in a second.
    """

    flops: float
    bytes: float
    region: float
    op: float = 0.0
    traffic: float = math.inf
    unpacked: float = math.inf

    def beside(self, work: GraphWork, threads: int) -> int:
        """What a step has to do beside its FLOPs, as FLOPs that the device does in that time.
        ``threads``: they share all but the calls of ops."""
        called = work.ops * self.op * self.flops * threads
        moved = (work.traffic / self.traffic + work.unpacked / self.unpacked) * self.flops
        return int(called + moved)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a region's frozen matmuls in one step: dense, and sliced with what that adds."""

    dense: float
    sliced: float

    @property
    def pays(self) -> bool:
        """Whether slicing is predicted to be faster."""
        return self.sliced < self.dense


# An H200 (commit b8e6301, torch 2.11): 0.440 ms for 3072 x 4096 x 14336 in bf16, and 2.06 us for
# the smallest kernels of a step (112 split-K reductions in 0.231 ms), of which a block of two
# regions launches 73 more than a dense one (`benchmarks/results/launches.json`). Bytes of gathers
# were not measured apart, and are left out.
_GPUS = {("NVIDIA H200", torch.bfloat16): Rates(8.2e14, math.inf, 36 * 2.06e-6)}
# One thread of an x86-64 server CPU (torch 2.13): matmuls of 64 to 256 tokens with 1024 x 384, and
# gathers of half of its rows. What else slicing adds to a region was not measured, and is left out.
# Beside FLOPs: fitted to whole steps under Inductor of seven small Llamas (width 64 to 512, 48 to
# 1024 tokens, one of them in NF4) on one thread of a CPU of 7.0e10 FLOPs a second. There it is
# 13 us an op, 12 GB of traffic a second and 5e8 elements a second; here in proportion to matmuls.
_BESIDE = (7.6e-6, 2.06e10, 8.6e8)
_CPU = {
    torch.float32: Rates(1.2e11, 4e10, 0.0, *_BESIDE),
    torch.bfloat16: Rates(3.1e11, 3.7e10, 0.0, *_BESIDE),
}


def estimate(region: Region) -> Estimate | None:
    """A region's cost in the step that is traced; None for a device or dtype that was not
    measured.

    Rule:   dense: 4 T N K operations for each linear. Sliced: the share of them that is kept, the
            kept weights copied for both products, and what a region adds.
    Sound:  a bound from below: a CPU copies the kept weights for each product. On a GPU, where
            templates read them in place, copies are not counted, and nowhere is what was not
            measured (predictors, rows that move).
    """
    weight = tensor(region.consumers[0].weight)
    rates = None if weight is None else rates_of(weight.device, weight.dtype)
    if weight is None or rates is None:
        return None
    dense = sliced = 0.0
    for site, kept in _kept_shares(region).items():
        rows, size = sparse_rows(site), site.out_features * site.in_features
        work = 4.0 * rows * size / rates.flops  # two products of two operations each
        copied = 2 * 2 * kept * size * weight.element_size() / rates.bytes  # both read and write
        dense += work
        sliced += kept * work + copied
    return Estimate(dense, sliced + rates.region)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """What a device was measured to do; None: it was not measured."""
    if device.type == "cuda":
        return _GPUS.get((torch.cuda.get_device_name(device), dtype))
    return _CPU.get(dtype) if device.type == "cpu" else None


def _kept_shares(region: Region) -> dict[Site, float]:
    """The share of each site's weight that is read."""
    rows: dict[Site, float] = {}
    for choice in region.choices:
        for pick in choice.producers:
            share = choice.kept * len(pick.maps) / pick.site.out_features
            rows[pick.site] = rows.get(pick.site, 0.0) + share
    last = region.choices[-1]
    return {**rows, **dict.fromkeys(region.consumers, last.kept / last.channels)}


def sparse_rows(site: Site) -> int:
    """How many rows of a site's input are sparse in the call that is traced."""
    listed: fx.Node = site.split[0].idx if site.split is not None else site.x
    example = tensor(listed)
    assert isinstance(example, Tensor)
    sizes = example.shape if site.split is not None else example.shape[:-1]
    rows = 1
    for size in sizes:
        rows *= _torch.traced_size(size) if isinstance(size, torch.SymInt) else int(size)
    return rows
