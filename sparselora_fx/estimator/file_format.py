"""The file of an estimator: one safetensors file with a checksum over every byte.

Version 1 holds factors; version 2 also what calibration found, and is written only then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.estimator.statistics import Statistics
from sparselora_fx.model.frozen_weights import shown

_FORMAT = "sparselora_fx.svd"
_PLAIN, _CALIBRATED = 1, 2  # versions


class Contents(NamedTuple):
    """What a file holds: the fields of an `SVDEstimator`."""

    factors: dict[str, Factors]
    fingerprint: dict[str, str]
    seed: int
    complete: bool
    statistics: dict[str, Statistics]


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write one file, replacing ``path`` atomically; `EstimatorError` if that fails."""
    named = {
        f"{name}.{part}": tensor
        for table in (contents.factors, contents.statistics)
        for name, parts in table.items()
        for part, tensor in parts._asdict().items()
    }
    header: dict[str, object] = {
        "format": _FORMAT,
        "version": _CALIBRATED if contents.statistics else _PLAIN,
        "seed": contents.seed,
        "complete": contents.complete,
        "ranks": {name: pair.b.shape[0] for name, pair in contents.factors.items()},
        "fingerprint": contents.fingerprint,
    }
    if contents.statistics:
        header["calibrated"] = list(contents.statistics)
    write_tensors(path, header, named)


def write_tensors(
    path: str | os.PathLike[str], header: dict[str, object], named: Mapping[str, Tensor]
) -> None:
    """Write tensors and a JSON header with a checksum over both, replacing ``path`` atomically."""
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in named.items()}
    header = {**header, "checksum": _checksum(header, tensors)}
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, partial, metadata={"sparselora_fx": json.dumps(header)})
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise EstimatorError(f"cannot write the estimator to {str(path)!r}: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[object, dict[str, Tensor]]:
    """The header (whatever it is) and the tensors of a file; see `check_sum`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        return json.loads(metadata.get("sparselora_fx", "null")), tensors
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise EstimatorError(
            f"cannot read the estimator {str(path)!r}: {error}; build and save it again"
        ) from error


def check_sum(header: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """Refuse a header and tensors that are not those that were written together."""
    if header.get("checksum") != _checksum(header, tensors):
        raise EstimatorError("is damaged (its checksum differs)")


def read(path: str | os.PathLike[str]) -> Contents:
    """Read what `write` wrote; `EstimatorError` for anything else."""
    header, tensors = read_tensors(path)
    try:
        return _contents(header, tensors)
    except EstimatorError as error:
        raise EstimatorError(
            f"{str(path)!r} {error}; build the estimator again and save it"
        ) from None


def _checksum(header: dict[str, object], tensors: dict[str, Tensor]) -> str:
    rest = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for key in sorted(tensors):
        t = tensors[key]
        digest.update(f"{key}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _contents(header: object, tensors: dict[str, Tensor]) -> Contents:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise EstimatorError("is no estimator file (its metadata does not say so)")
    if header.get("version") not in (_PLAIN, _CALIBRATED):
        raise EstimatorError(
            f"has format version {header.get('version')!r}, "
            f"this release reads {_PLAIN} and {_CALIBRATED}"
        )
    prints, ranks = header.get("fingerprint"), header.get("ranks")
    calibrated = header.get("calibrated", [])
    if not isinstance(prints, dict) or not isinstance(ranks, dict) or prints.keys() != ranks.keys():
        raise EstimatorError("lacks its fingerprints or ranks")
    if not isinstance(calibrated, list) or not set(calibrated) <= prints.keys():
        raise EstimatorError("has statistics of weights that it does not know")
    expected = {f"{name}.{part}" for name in prints for part in Factors._fields}
    expected |= {f"{name}.{part}" for name in calibrated for part in Statistics._fields}
    missing = sorted(expected - tensors.keys())
    if missing or len(tensors) != len(expected):
        raise EstimatorError(
            f"lacks the tensors {shown(missing)}"
            if missing
            else "has tensors without a fingerprint"
        )
    check_sum(header, tensors)
    return Contents(
        {n: Factors(*(tensors[f"{n}.{part}"] for part in Factors._fields)) for n in prints},
        prints,
        int(header.get("seed", 0)),
        bool(header.get("complete", True)),
        {n: Statistics(*(tensors[f"{n}.{p}"] for p in Statistics._fields)) for n in calibrated},
    )
