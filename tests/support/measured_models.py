"""What tests share: measured models."""

from __future__ import annotations

from typing import Any

from torch import nn

import sparselora_fx as slx
from tests.support import oracle

LEVELS = (0.5, 0.75)


def batches(lengths: tuple[int, ...] = (13, 13)) -> list[dict[str, Any]]:
    """Batches whose first five tokens are context."""
    found = [oracle.batch(length=n, seed=7 + i) for i, n in enumerate(lengths)]
    for data in found:
        data["labels"][:, :5] = -100
    return found


def measure(model: nn.Module, data: Any = None, **options: Any) -> slx.SensitivityTable:
    options = {"backend": "eager", "channel_multiple": 1, "progress": False} | options
    data = batches() if data is None else data
    return slx.sensitivity(model, oracle.estimator_of(model), data, LEVELS, **options)
