"""An estimator that knows nothing, to compare others with."""

from __future__ import annotations

from dataclasses import replace

import torch

import sparselora_fx as slx
from sparselora_fx.estimator.low_rank import Factors


def noise(estimator: slx.SVDEstimator, seed: int) -> slx.SVDEstimator:
    """The estimator with factors that know nothing of the weights: Gaussian, of the same scale."""
    generator = torch.Generator().manual_seed(seed)

    def like(values: torch.Tensor) -> torch.Tensor:
        return torch.randn(values.shape, generator=generator).to(values.dtype) * values.std()

    factors = {name: Factors(like(a), like(b)) for name, (a, b) in estimator.factors.items()}
    return replace(estimator, factors=factors)
