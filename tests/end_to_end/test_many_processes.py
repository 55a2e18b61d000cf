"""Data parallel training: each process chooses for its own batch, and gradients are averaged."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparselora_fx as slx
from tests.support import oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="processes on CPUs need gloo"),
]


def trains_as_its_half(rank: int, store: str) -> None:
    """One process: the gradients under DDP are the mean over processes of those without."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch._dynamo.config.optimize_ddp = False  # as docs/many_gpus.md asks for
    model = oracle.llama(layers=1, dtype=torch.float64)
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.5), backend="eager")
    data = oracle.batch(seed=rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with slx.record(model) as record:
        shared = oracle.step(wrapped, data).gradients
    assert len(record.sites) == 7
    alone = oracle.step(model, data).gradients
    for name, own in alone.items():
        dist.all_reduce(own)
        torch.testing.assert_close(shared[f"module.{name}"], own / 2, rtol=1e-12, atol=1e-12)
    # The reducer's last reference to the group must not be the last of all: torch then joins gloo's
    # thread while it holds the interpreter's lock, for which that thread may be waiting.
    del wrapped
    gc.collect()
    dist.destroy_process_group()


def test_gradients_are_the_mean_of_the_processes(tmp_path: Path) -> None:
    # daemon: ended with this process, should the test run out of time
    mp.spawn(trains_as_its_half, (str(tmp_path / "store"),), nprocs=2, daemon=True)
