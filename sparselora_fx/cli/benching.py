"""``sparselora-fx bench``: a training step of the configured model, dense and sparse in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparselora_fx.cli.config import Config
from sparselora_fx.cli.models import estimator_of, load
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.user.compile import compile, step

_WARM = 3  # steps of each kind before any is timed


def bench(config: Config, pairs: int, *, progress: bool) -> dict[str, Any]:
    """Time forward and backward of one batch, dense and sparse in turn, in this process.

    Dense is the same compiled model before its schedule begins: what `torch.compile` makes of it.

    Args:
        pairs: of steps; the ratio is the median over them.
    """
    loaded = load(config)
    batch = next(loaded.batches(1))
    estimator = estimator_of(loaded, progress=progress)
    loaded.model.zero_grad(set_to_none=True)
    # Step 0 is dense and step 1 sparse, at the whole plan, whatever its own schedule is.
    schedule = {"start_step": 1, "end_step": None, "ramp": (), "calibrate": None, "refresh": None,
                "min_steps": 0, "max_loss_gap": None}  # fmt: skip
    plan = SparsityPlan(**{**config.plan.to_dict(), **schedule})
    options = vars(config.compile) | {"precompile": False, "verify_speed": False}
    model = compile(loaded.model, estimator, plan=plan, **options)
    kinds = {"dense": 0, "sparse": 1}
    for number in kinds.values():
        for _ in range(_WARM):
            _timed(model, batch, number)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(pairs):
        order = list(kinds) if turn % 2 == 0 else list(reversed(kinds))
        for kind in order:
            times[kind].append(_timed(model, batch, kinds[kind]))
    ratios = [d / s for d, s in zip(times["dense"], times["sparse"], strict=True)]
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "sparse_ms": 1e3 * statistics.median(times["sparse"]),
        "ratio": statistics.median(ratios),
        "pairs": pairs,
        "device": name,
        "torch": torch.__version__,
        "batch": list(batch["input_ids"].shape),
    }


def _timed(model: nn.Module, batch: Mapping[str, Any], number: int) -> float:
    """Seconds of one forward and backward, as the given step of the schedule."""
    step(model, number, 2)
    model.zero_grad(set_to_none=True)
    _wait()
    start = time.perf_counter()
    model(**batch).loss.backward()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
