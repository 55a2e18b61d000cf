"""Moments of what a linear reads, and the low-rank factors that are best for it.

Shape letters: T tokens, K input channels, N output channels, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.low_rank import Factors, low_rank

DAMPING = 1e-4  # of the mean variance, added to every direction of an input


class Statistics(NamedTuple):
    """What calibration knows of one weight beside its factors; float32, or float64 for such a
    weight. Empty (``[0]``) where calibration did not look.

    Attributes:
        offset: ``[N]``, so that ``W x ~= a @ b @ x + offset`` (the bias comes on top).
        output: ``[N]``, mean square of ``W x + bias``: the prior of a query or key channel.
        input: ``[K]``, mean square of the input: the prior of a consumer's channel.
        share: ``[K]``, mean over tokens of ``x_k^2 / sum_m (x_m * norms_m)^2``: the same prior with
            every token counted alike, however large. (``norms`` of the first weight of those that
            read one input; a consumer's input has one reader.)
        norms: ``[K]``, column norms of the weight: what a consumer makes of each channel.
    """

    offset: Tensor
    output: Tensor
    input: Tensor
    share: Tensor
    norms: Tensor


class Moment:
    """Running moments of one input over counted tokens, in float32 (float64 for such an input).

    Kept around the mean of the first tokens, so that a large mean does not drown the variance.
    Memory: ``K * K`` values if ``full``, else a few times K.
    """

    def __init__(self, norms: Tensor, *, full: bool) -> None:
        """``norms [K]``: column norms of the weight that reads the input."""
        self.norms = norms
        self.full = full
        self.count = 0
        self.share = torch.zeros_like(norms)
        self.shift = torch.zeros_like(norms)
        self.total = torch.zeros_like(norms)
        size = (len(norms), len(norms)) if full else (len(norms),)
        self.second = norms.new_zeros(size)

    def add(self, x: Tensor) -> None:
        """Count the tokens ``x[T, K]``."""
        if not len(x):
            return
        x = x.to(self.norms.dtype)
        if not self.count:
            self.shift = x.mean(dim=0)
        square = x.square()
        energy = (square @ self.norms.square()).clamp(min=torch.finfo(x.dtype).tiny)
        self.share += (square / energy[:, None]).sum(dim=0)
        x = x - self.shift
        self.total += x.sum(dim=0)
        self.second += x.t() @ x if self.full else x.square().sum(dim=0)
        self.count += len(x)

    def mean(self) -> Tensor:
        """``[K]``."""
        return self.shift + self.total / self.count

    def covariance(self) -> Tensor:
        """``[K, K]``; needs ``full``."""
        drift = self.total / self.count
        return self.second / self.count - drift[:, None] * drift

    def square(self) -> Tensor:
        """Mean square of each channel, ``[K]``."""
        second = self.second.diagonal() if self.full else self.second
        drift = self.total / self.count
        return (second / self.count - drift.square()).clamp(min=0) + self.mean().square()


def column_norms(w: Tensor) -> Tensor:
    """``[K]`` column norms of ``w[N, K]``, in float32 (float64 for such a weight)."""
    norms: Tensor = torch.linalg.vector_norm(w.detach(), dim=0, dtype=_wide(w))
    return norms


def aware_factors(
    w: Tensor, mean: Tensor, covariance: Tensor, rank: int, *, damping: float, seed: int
) -> tuple[Factors, Tensor, Tensor]:
    """The affine map of rank R that is nearest to ``W x`` in the mean square over the inputs.

    With C the covariance of x and L L^T = C + damping * mean(diag C) * I, the leading left
    singular vectors U of ``W L`` give ``a = U``, ``b = U^T W`` and ``offset = (W - a b) mean``: by
    Eckart and Young nothing of that rank leaves a smaller ``E|W x - a b x - offset|^2``. The
    damping keeps directions that calibration hardly saw from counting as impossible.

    Source: activation-aware truncation as in ASVD (arXiv 2312.05821) and SVD-LLM
    (arXiv 2403.07378); the centring is ours.

    Args:
        w: ``[N, K]``, any floating dtype.
        mean, covariance: ``[K]`` and ``[K, K]`` of the input, float32 or float64.
        damping: at least 0; see above.

    Returns:
        The factors in w's dtype, ``offset [N]``, and the variance of ``W x`` by channel, ``[N]``.

    Raises:
        EstimatorError: inf or NaN in the weight or in the moments.
    """
    full = w.detach().to(covariance.dtype)
    if not bool(torch.isfinite(covariance).all()):
        raise EstimatorError(
            "the calibration inputs hold inf or NaN; check the batches and the model's dtype"
        )
    root, added = _root(covariance, damping)
    scaled = full @ root
    a, _ = low_rank(scaled, rank, generator=torch.Generator().manual_seed(seed))
    u = torch.nn.functional.normalize(a, dim=0)
    b = u.t() @ full
    offset = full @ mean - u @ (b @ mean)
    variance = scaled.square().sum(dim=1) - added * full.square().sum(dim=1)
    plain = torch.contiguous_format
    factors = Factors(
        u.to(w.dtype).clone(memory_format=plain), b.to(w.dtype).clone(memory_format=plain)
    )
    return factors, offset, variance.clamp(min=0)


def _root(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """Cholesky factor of the damped covariance, and what was added to its diagonal: ten times more
    until rounding leaves it positive."""
    limits = torch.finfo(covariance.dtype)
    level = max(float(covariance.diagonal().mean()), limits.tiny / limits.eps)
    added = level * max(damping, limits.eps)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for _ in range(12):
        root, failed = torch.linalg.cholesky_ex(covariance + added * eye)
        if not int(failed):
            return root, added
        added *= 10
    raise EstimatorError("the covariance of the inputs is not positive; raise `damping`")


def _wide(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32
