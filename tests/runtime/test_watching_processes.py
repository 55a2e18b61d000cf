"""Two processes that train together agree on every probe, whatever breaks in one of them."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny


def train(rank: int, folder: Path) -> None:
    """Three steps on this rank's batches; the second rank's break from the second one on."""
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, plan = tiny(2), {"layers.0.mlp": 0.6, "layers.1.mlp": 0.5}
    plan = slx.SparsityPlan(plan, tokens="all", start_step=0, channel_multiple=1)
    watch = slx.Watch(every=1, tolerance=100, mode="adapt")
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", watch=watch)
    runtime, healthy = get_runtime(model), model.forward.compiled
    for n in range(3):
        slx.step(model, n, 3)
        if n == 1 and rank == 1:

            def broken(*args: Any, **kwargs: Any) -> Any:
                if runtime.sparse_now:
                    raise RuntimeError("out of memory")
                return healthy(*args, **kwargs)

            model.forward.compiled = broken
        model(**oracle.batch(seed=2 * n + rank)).loss.backward()
        model.zero_grad()
    slx.step(model, 3, 4)
    (folder / f"{rank}.json").write_text(json.dumps(slx.drift(model).to_json()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_agree(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        if rank.is_alive():
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [probe["step"] for probe in first["probes"]] == [0, 1, 2]
