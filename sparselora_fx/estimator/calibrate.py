"""Run a model on calibration batches and keep the moments of what its frozen weights read."""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.estimator.orientation import as_listed, oriented
from sparselora_fx.estimator.statistics import Moment, Statistics, aware_factors, column_norms
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.packed import kept_as_stored
from sparselora_fx.model.preserve import kept_modes
from sparselora_fx.model.signature import base_model
from sparselora_fx.model.weight_layout import likely_consumers

_MOMENT_BYTES = 1 << 30  # of full second moments held at once, unless `layers_per_pass` says
_RECENT = 8  # inputs remembered while looking for weights that read the same one

Reader = Callable[[FrozenWeight, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """How to calibrate; see `SVDEstimator.build`."""

    damping: float
    layers_per_pass: int | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        damping, limit = self.damping, self.layers_per_pass
        number = isinstance(damping, int | float) and not isinstance(damping, bool)
        if not number or not 0 <= damping < float("inf"):
            raise EstimatorError(f"damping is {damping!r}; allowed: a number >= 0, such as 1e-4")
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and (not whole or limit < 1):
            raise EstimatorError(f"layers_per_pass is {limit!r}; allowed: a positive int, or None")


Found = tuple[FrozenWeight, Factors | None, Statistics]


def calibrate(
    model: nn.Module,
    weights: list[FrozenWeight],
    ranks: Mapping[str, int],
    batches: Iterable[object],
    settings: Settings,
) -> list[Found]:
    """Factors and statistics of every weight that the batches reach, input by input.

    Weights that read the same tensor (q, k and v; gate and up) share one moment. Full moments
    (``K * K`` values) are held for a few inputs at a time: as many passes over the batches are made
    as that takes. Likely consumers, whose outputs are never chosen, need no full moment: their
    factors are None.

    Raises:
        EstimatorError: no batch, a batch that is no dict, or one in which no token counts.
    """
    stored = list(batches) if iter(batches) is batches else batches  # several passes read it
    if (first := next(iter(stored), None)) is None:
        raise EstimatorError("calibration has no batches; give at least one dict of model inputs")
    listed = {w.canonical: w for w in weights}
    weights = oriented(weights, lambda: _run(model, [], first, lambda w, x: None))
    full = {id(w) for w in weights} - {id(w) for w in likely_consumers(weights)}
    groups = _groups(model, weights, first)
    found: list[Found] = []
    for part in _passes(groups, full, settings.layers_per_pass):
        moments = {
            id(group[0]): Moment(column_norms(group[0].logical()), full=id(group[0]) in full)
            for group in part
        }
        owners = [group[0] for group in part]

        def count(w: FrozenWeight, x: Tensor, moments: dict[int, Moment] = moments) -> None:
            moments[id(w)].add(x)

        for batch in tqdm(stored, desc="calibration", unit="batch", disable=not settings.progress):
            _run(model, owners, batch, count)
        for group in part:
            moment = moments.pop(id(group[0]))
            if not moment.count:
                continue
            for w in group:
                done = finish(w, moment, ranks[w.canonical], settings)
                found.append(listed_as(listed[w.canonical], w, *done))
    if not found:
        raise EstimatorError(
            "calibration reached no frozen weight: every token is padding (attention_mask 0), or "
            "the model does not call these weights; check the batches"
        )
    return found


def listed_as(
    listed: FrozenWeight, used: FrozenWeight, factors: Factors | None, statistics: Statistics
) -> Found:
    return listed, None if factors is None else as_listed(factors, listed, used), statistics


def finish(
    w: FrozenWeight, moment: Moment, rank: int, settings: Settings
) -> tuple[Factors | None, Statistics]:
    """Factors (None without a full moment) and statistics of a weight, from what it read.

    Raises:
        EstimatorError: inf or NaN in the weight or in the moment.
    """
    none = moment.total.new_empty(0)
    kept = (moment.square(), moment.share / moment.count, column_norms(w.logical()))
    if not moment.full:
        return None, _on_cpu(Statistics(none, none, *kept))
    weight, mean = w.logical(), moment.mean()
    try:
        factors, offset, variance = aware_factors(
            weight, mean, moment.covariance(), rank, damping=settings.damping, seed=settings.seed
        )
    except EstimatorError as error:
        raise EstimatorError(f"{w.name}: {error}") from None
    center = weight.detach().to(mean.dtype) @ mean
    bias = getattr(w.module, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == center.shape:
        center = center + bias.detach().to(mean.dtype)
    on_cpu = Factors(*(part.cpu() for part in factors))
    return on_cpu, _on_cpu(Statistics(offset, variance + center.square(), *kept))


def _on_cpu(statistics: Statistics) -> Statistics:
    return Statistics(*(part.detach().cpu() for part in statistics))


def _groups(
    model: nn.Module, weights: list[FrozenWeight], batch: object
) -> list[list[FrozenWeight]]:
    """Weights by the input they read, in the order of the forward; those that are not reached are
    left out."""
    groups: list[list[FrozenWeight]] = []
    recent: deque[tuple[Tensor, list[FrozenWeight]]] = deque(maxlen=_RECENT)
    placed: set[int] = set()

    def place(w: FrozenWeight, x: Tensor) -> None:
        if id(w) in placed:
            return
        placed.add(id(w))
        for tensor, group in recent:
            if tensor is x:
                group.append(w)
                return
        groups.append([w])
        recent.append((x, groups[-1]))

    owned = Counter(id(w.module) for w in weights)
    alone = [w for w in weights if owned[id(w.module)] == 1]
    _run(model, alone, batch, place, flat=False)
    return groups


def _passes(
    groups: list[list[FrozenWeight]], full: set[int], limit: int | None
) -> Iterator[list[list[FrozenWeight]]]:
    """Groups to calibrate together: ``limit`` inputs, or as many as fit the memory budget."""
    part: list[list[FrozenWeight]] = []
    held = 0
    for group in groups:
        size = 4 * group[0].in_features ** 2 if id(group[0]) in full else 0
        over = len(part) >= limit if limit is not None else held + size > _MOMENT_BYTES
        if part and over:
            yield part
            part, held = [], 0
        part.append(group)
        held += size
    if part:
        yield part


def _run(
    model: nn.Module, weights: list[FrozenWeight], batch: object, read: Reader, *, flat: bool = True
) -> None:
    """One forward in eval mode; ``read(weight, x)`` gets each weight's input, counted tokens
    ``[T, K]`` if ``flat``."""
    if not isinstance(batch, Mapping):
        raise EstimatorError(
            f"a calibration batch is a {type(batch).__name__}; expected a dict of model inputs, "
            "such as {'input_ids': ..., 'attention_mask': ...}"
        )
    device = weights[0].weight.device if weights else torch.device("cpu")
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    mask = inputs.get("attention_mask")
    handles = []
    for w in weights:

        def hook(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], w: FrozenWeight = w
        ) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is not None and x.dim() >= 2 and x.shape[-1] == w.in_features:
                read(w, _counted(x.detach(), mask) if flat else x)

        handles.append(w.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with _evaluating(model):
            model(**_without_cache(model, inputs))
    finally:
        for handle in handles:
            handle.remove()


def _counted(x: Tensor, mask: object) -> Tensor:
    """``[T, K]``: the tokens that are not padding (all, where the mask is not about them)."""
    rows = x.flatten(0, -2)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == len(rows):
        rows = rows[mask.flatten().bool()]
    return rows


def _without_cache(model: nn.Module, inputs: dict[str, object]) -> dict[str, object]:
    if "use_cache" in inspect.signature(base_model(model).forward).parameters:
        return {"use_cache": False, **inputs}
    return inputs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    with kept_modes(model), kept_as_stored(model), torch.no_grad():
        model.eval()
        yield
