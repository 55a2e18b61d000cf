"""Keep what a dense phase has collected, or what was built from it, in a file; and go on from it.

Before the switch the file holds moments (`Collector`), after it an `SVDEstimator`, which
`SVDEstimator.load` reads too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparselora_fx.errors import CompileError, EstimatorError
from sparselora_fx.estimator.file_format import check_sum, read_tensors, write_tensors
from sparselora_fx.estimator.online import Collector
from sparselora_fx.estimator.statistics import Moment, column_norms
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.model.frozen_weights import fingerprint_of, shown
from sparselora_fx.runtime.runtime import get_runtime

_FORMAT, _VERSION = "sparselora_fx.moments", 1
_PARTS = ("share", "shift", "total", "second")  # of a Moment; its norms are those of the weight


def save_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what a compiled model has collected in its dense phase, or its estimator after that.

    Args:
        model: compiled with a plan that says ``calibrate="dense_phase"``.
        path: of the file; replaced atomically.

    Raises:
        CompileError: the model is not compiled, or its plan does not calibrate.
        EstimatorError: the file cannot be written.
    """
    collector = _collector_of(model)
    if collector.estimator is not None:
        collector.estimator.save(path)
        return
    reached = {name for names in collector.readers.values() for name in names}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "calls": collector.calls,
        "first": collector.first,
        "readers": collector.readers,
        "turned": sorted(collector.turned),
        "counts": {key: moment.count for key, moment in collector.moments.items()},
        "full": {key: moment.full for key, moment in collector.moments.items()},
        "fingerprint": {n: _print(collector, n) for n in sorted(reached)},
    }
    tensors = {
        f"{key}.{part}": getattr(moment, part)
        for key, moment in collector.moments.items()
        for part in _PARTS
    }
    write_tensors(path, header, tensors)


def load_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Go on from what `save_calibration` wrote: collect further, or predict from that estimator.

    What was collected before is forgotten. Call it after `compile` and before the first step.

    Args:
        model: compiled with a plan that says ``calibrate="dense_phase"``.
        path: of the file.

    Raises:
        CompileError: the model is not compiled, or its plan does not calibrate.
        EstimatorError: no such file, a damaged one, one of another model, or another rank.
    """
    runtime, collector = get_runtime(model), _collector_of(model)
    header, tensors = read_tensors(path)
    if isinstance(header, dict) and header.get("format") == _FORMAT:
        try:
            _take_over(collector, header, tensors)
        except EstimatorError as error:
            raise EstimatorError(f"{str(path)!r} {error}; start without it") from None
        return
    estimator = SVDEstimator.load(path)
    estimator.check_matches(model, collector.weights)
    for name, rank in collector.ranks.items():
        got = estimator.factors[name].b.shape[0]
        if got != rank:
            raise EstimatorError(
                f"{str(path)!r} has rank {got} for {name}, the compiled plan {rank}; "
                f"compile with rank={got} in the plan"
            )
    runtime.attached.place(estimator, collector.score)
    collector.forget()
    collector.estimator = estimator


def _take_over(collector: Collector, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if header.get("version") != _VERSION:
        raise EstimatorError(f"has version {header.get('version')!r}, this release reads 1")
    check_sum(header, tensors)
    prints = header["fingerprint"]
    other = [
        name
        for name, expected in prints.items()
        if name not in collector.by_canonical or _print(collector, name) != expected
    ]
    if other:
        raise EstimatorError(f"does not belong to this model and plan: {shown(other)}")
    collector.turned = set(header.get("turned", ()))
    moments = {}
    for key in header["readers"]:
        weight = collector.used(collector.by_canonical[key])
        moment = Moment(column_norms(weight.logical()), full=header["full"][key])
        moment.count = header["counts"][key]
        for part in _PARTS:
            held: Tensor = getattr(moment, part)
            held.copy_(tensors[f"{key}.{part}"])
        moments[key] = moment
    collector.moments, collector.readers = moments, dict(header["readers"])
    collector.calls, collector.first = header["calls"], header["first"]
    collector.estimator = None


def _print(collector: Collector, name: str) -> str:
    return fingerprint_of(collector.by_canonical[name].logical())


def _collector_of(model: nn.Module) -> Collector:
    collector = get_runtime(model).collector
    if collector is None:
        raise CompileError(
            "this model's plan does not calibrate in a dense phase; compile it with "
            "SparsityPlan(..., calibrate='dense_phase') and a start_step above 0"
        )
    return collector


def calibration_file(folder: str | os.PathLike[str]) -> Path:
    """Where `SparsityCallback` keeps it beside a checkpoint."""
    return Path(folder) / "sparselora_estimator.safetensors"
