"""What tests share: replayed steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.compiler.cuda_graphs import CudaGraphs
from sparselora_fx.runtime.runtime import get_runtime
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def batches(count: int, *, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Batches of one size whose token lists are equally long, and hold other tokens each."""
    for seed in range(count):
        data = ragged(seed=seed + 1)
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        yield {name: value[order].to(device) for name, value in data.items()}


def graphs_of(model: nn.Module) -> CudaGraphs:
    graphs = get_runtime(model).cuda_graphs
    assert graphs is not None
    return graphs
