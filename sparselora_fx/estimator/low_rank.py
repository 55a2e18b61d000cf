"""Randomised truncated SVD of one weight, or of all weights of a model in groups.

Source: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from sparselora_fx.errors import EstimatorError
from sparselora_fx.model.frozen_weights import FrozenWeight, shown, suffix_distance

_BATCH_BYTES = 2 << 30  # of weights in float32 that are factored at once on a GPU
_DEFAULT_RANK = 8
_OVERSAMPLE = 8  # directions sketched and then dropped
_ITERATIONS = 2  # of the subspace, each two more passes over a weight
_SMALL = 1 << 22  # values of a weight; below it one CPU thread is as fast as many


class Factors(NamedTuple):
    """``W ~= a @ b`` for ``W`` of ``[N, K]``: ``a = U * S`` ``[N, r]``, ``b = Vh`` ``[r, K]``."""

    a: torch.Tensor
    b: torch.Tensor


def low_rank(
    w: torch.Tensor, rank: int, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor ``w ~= a @ b`` by the leading ``rank`` singular triplets: ``a = U * S``, ``b = Vh``.

    Computed in float64 for float64 input and in float32 otherwise; returned in ``w``'s dtype, on
    its device. A sketch of eight more directions is made and iterated twice, which is enough for
    slowly decaying spectra; where it would be as large as the weight, the exact SVD is used.

    Args:
        w: ``[..., N, K]``, any floating dtype and strides; leading dimensions are a batch.
        rank: ``1 <= rank <= min(N, K)``; not clamped.
        generator: a CPU generator for the sketch. The same seed gives the same sketch on every
            device, and the whole batch shares it, so batching does not change the result. None:
            seed 0.

    Returns:
        ``a``: ``[..., N, rank]`` and ``b``: ``[..., rank, K]``.

    Raises:
        EstimatorError: ``rank`` is out of range, or ``w`` holds inf or NaN.
    """
    n, k = w.shape[-2:]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(n, k):
        raise EstimatorError(
            f"rank is {rank!r}; a {n} x {k} weight allows an int from 1 to {min(n, k)}"
        )
    exact_dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    with torch.no_grad(), _one_thread(w.numel() < _SMALL):
        full = w.detach().to(exact_dtype)
        basis, small = None, full
        if rank + _OVERSAMPLE < min(n, k):
            basis = _range_basis(full, rank + _OVERSAMPLE, generator)
            small = basis.mT @ full
        if not bool(torch.isfinite(small).all()):
            raise EstimatorError(
                "the weight holds inf or NaN; reload the model from a good checkpoint"
            )
        with _one_thread():
            u, s, vh = torch.linalg.svd(small, full_matrices=False)
        a = u[..., :rank] * s[..., None, :rank]
        a = a if basis is None else basis @ a
        return a.to(w.dtype), vh[..., :rank, :].to(w.dtype)


def _range_basis(w: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Orthonormal ``[..., N, size]`` basis of the leading left singular directions of ``w``."""
    generator = generator or torch.Generator().manual_seed(0)
    omega = torch.randn(w.shape[-1], size, generator=generator, dtype=w.dtype).to(w.device)
    basis: torch.Tensor = w @ omega
    if not bool(torch.isfinite(basis).all()):
        return basis  # QR would raise an opaque error; the caller reports it
    basis = _orthonormal(basis)
    for _ in range(_ITERATIONS):
        basis = _orthonormal(w @ _orthonormal(w.mT @ basis))
    return basis


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    with _one_thread():
        q: torch.Tensor = torch.linalg.qr(columns)[0]
    return q


@contextmanager
def _one_thread(when: bool = True) -> Iterator[None]:
    """Run small or thin CPU work on one thread.

    More threads gain nothing on 16 columns, and where the cores are shared their barriers cost
    100 times the work itself.
    """
    if not when:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ranks_of(weights: list[FrozenWeight], rank: int | Mapping[str, int]) -> dict[str, int]:
    """The rank of every weight by canonical name, clamped to its size."""
    table = {"": _DEFAULT_RANK, **rank} if isinstance(rank, Mapping) else {"": rank}
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            where = f" for {key!r}" if key else ""
            raise EstimatorError(f"rank is {value!r}{where}; allowed: a positive int, such as 8")
    covered: dict[str, list[FrozenWeight]] = {key: [] for key in table}
    ranks = {}
    for w in weights:
        hits = [
            (d, -len(key), key)
            for key in table
            if key and (d := suffix_distance(key, w.name)) is not None
        ]
        key = min(hits)[2] if hits else ""
        for hit in {key, *(hit for _, _, hit in hits)}:
            covered[hit].append(w)
        ranks[w.canonical] = min(table[key], w.out_features, w.in_features)
    for key, group in covered.items():
        largest = max((min(w.out_features, w.in_features) for w in group), default=0)
        if key and not group:
            raise EstimatorError(
                f"the rank for {key!r} matches no frozen weight, such as {weights[0].canonical!r}"
            )
        if table[key] > largest and not (key == "" and isinstance(rank, Mapping)):
            raise EstimatorError(
                f"rank {table[key]} exceeds every weight it applies to; allowed: up to {largest}"
            )
    return ranks


def groups_of(
    weights: list[FrozenWeight], ranks: Mapping[str, int], place: torch.device | None
) -> Iterator[tuple[FrozenWeight, ...]]:
    """Weights to factor together: one by one on the CPU, by equal shape up to a limit elsewhere."""
    if place is None or place.type == "cpu":
        yield from ((w,) for w in weights)
        return
    alike: dict[tuple[int, int, torch.dtype, int], list[FrozenWeight]] = defaultdict(list)
    for w in weights:
        alike[w.out_features, w.in_features, w.dtype, ranks[w.canonical]].append(w)
    for (n, k, dtype, _), group in alike.items():
        size = max(1, _BATCH_BYTES // (n * k * max(4, dtype.itemsize)))
        yield from (tuple(group[i : i + size]) for i in range(0, len(group), size))


def factor_group(
    group: tuple[FrozenWeight, ...], rank: int, place: torch.device | None, seed: int
) -> list[Factors]:
    """Factors on the CPU of weights of one shape, dtype and device placement.

    Raises:
        EstimatorError: a weight holds inf or NaN.
    """
    parts = [w.logical().detach() for w in group]
    stack = parts[0][None] if len(parts) == 1 else torch.stack([p.to(place) for p in parts])
    try:
        a, b = low_rank(
            stack.to(place) if place else stack, rank, generator=torch.Generator().manual_seed(seed)
        )
    except EstimatorError as error:
        raise EstimatorError(f"{shown([w.name for w in group])}: {error}") from None
    plain = torch.contiguous_format  # own storage, row-major: LAPACK's factors are neither
    return [
        Factors(x.cpu().clone(memory_format=plain), y.cpu().clone(memory_format=plain))
        for x, y in zip(a, b, strict=True)
    ]


def compute_device(device: str | torch.device | None) -> torch.device | None:
    """``device``, else CUDA if there is one, else None: compute where the weights are."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda") if torch.cuda.is_available() else None


def plain_factors(
    weights: list[FrozenWeight],
    ranks: Mapping[str, int],
    place: torch.device | None,
    seed: int,
    *,
    progress: bool,
) -> dict[str, Factors]:
    """Truncated SVDs of the weights themselves, by canonical name."""
    factors: dict[str, Factors] = {}
    with tqdm(total=len(weights), desc="estimator", unit="weight", disable=not progress) as bar:
        for group in groups_of(weights, ranks, place):
            pairs = factor_group(group, ranks[group[0].canonical], place, seed)
            factors.update(zip((w.canonical for w in group), pairs, strict=True))
            bar.update(len(group))
    return factors
