"""The estimator: rank-r factors of every frozen weight, built once and kept in one file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from .errors import EstimatorError
from .frozen import FrozenWeight, fingerprint_of, frozen_weights, shown
from .spft import read_spft
from .svd import Factors, compute_device, factor_group, groups_of, ranks_of

_FORMAT = "sparselora_fx.svd"
_VERSION = 1


@dataclass
class SVDEstimator:
    """Truncated SVD of every frozen weight.

    The training-free predictor of the SparseLoRA paper (arXiv 2506.16500). Keys are canonical names
    (``FrozenWeight.canonical``), equal with and without PEFT.

    Attributes:
        factors: per weight ``Factors`` on the CPU, in the dtype of the weight it was built from.
        fingerprint: per weight its shape and a cheap content hash, see ``fingerprint_of``.
        seed: seed of the randomised SVD; the same seed gives the same factors.
        complete: the factors cover every frozen weight of the model they were built from.
    """

    factors: dict[str, Factors]
    fingerprint: dict[str, str]
    seed: int = 0
    complete: bool = True

    @classmethod
    def build(
        cls,
        model: nn.Module,
        rank: int | Mapping[str, int] = 8,
        *,
        device: str | torch.device | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> SVDEstimator:
        """Factor every frozen weight of ``model``, which is only read.

        Args:
            model: with LoRA attached or base weights frozen; any floating dtype and device but
                meta.
            rank: one rank, or a mapping of dotted suffix (of a module or of anything around it; the
                deepest match wins, then the longer key) to rank; weights that no key names get 8. A
                weight smaller than its rank gets ``min(N, K)``.
            device: where to compute; None: CUDA if there is one, else where the weights are. On
                CUDA weights of equal shape are factored in batches.
            progress: show a progress bar.
            seed: seed of the randomised SVD.

        Raises:
            EstimatorError: no frozen weight, a weight on the meta device, a weight with inf or NaN,
                a rank that is no positive int or exceeds every weight that it applies to, a key
                that matches nothing.
        """
        weights = _checked_weights(model)
        ranks = ranks_of(weights, rank)
        place = compute_device(device)
        factors: dict[str, Factors] = {}
        with tqdm(total=len(weights), desc="estimator", unit="weight", disable=not progress) as bar:
            for group in groups_of(weights, ranks, place):
                pairs = factor_group(group, ranks[group[0].canonical], place, seed)
                factors.update(zip((w.canonical for w in group), pairs, strict=True))
                bar.update(len(group))
        names = [w.canonical for w in weights]
        prints = {w.canonical: fingerprint_of(w.logical()) for w in weights}
        return cls({name: factors[name] for name in names}, prints, seed)

    @classmethod
    def from_spft(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        *,
        layers: Iterable[str] | None = None,
    ) -> SVDEstimator:
        """Read the reference implementation's predictor files; see ``spft.read_spft``.

        Args:
            directory: the folder of one model and rank (``.../<model>/r_8``), with or without
                ``mlp/`` and ``attn/``.
            model: the model that the files belong to; fixes shapes, dtypes and fingerprints. Its
                weights are not compared with the files.
            layers: module suffixes (``"layers.3.mlp"``) to read; None: every FFN and attention of
                the model. The published files may cover only the layers that are sparse in some
                plan; these are ``[key for key, s in plan.sparsity.items() if s]``.

        Raises:
            EstimatorError: files are missing (all are listed) or unreadable, or shapes do not fit
                the model.
        """
        weights = _checked_weights(model)
        pairs = read_spft(Path(directory), weights, None if layers is None else list(layers))
        used = [w for w in weights if w.canonical in pairs]
        factors = {w.canonical: Factors(*pairs[w.canonical]) for w in used}
        return cls(
            factors, {w.canonical: fingerprint_of(w.logical()) for w in used}, complete=False
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, replacing ``path`` atomically.

        It holds ``<name>.a`` and ``<name>.b`` for each weight and JSON metadata.

        Raises:
            EstimatorError: the file cannot be written.
        """
        tensors = {
            f"{n}.{part}": t.detach().cpu().contiguous().clone()
            for n, pair in self.factors.items()
            for part, t in zip("ab", pair, strict=True)
        }
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "seed": self.seed,
            "complete": self.complete,
            "ranks": {name: pair.b.shape[0] for name, pair in self.factors.items()},
            "fingerprint": self.fingerprint,
        }
        header["checksum"] = _checksum(header, tensors)
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, partial, metadata={"sparselora_fx": json.dumps(header)})
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise EstimatorError(f"cannot write the estimator to {str(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SVDEstimator:
        """Read what ``save`` wrote; every byte is covered by a checksum.

        Raises:
            EstimatorError: no such file, a damaged file, another format or version, missing keys.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            header = json.loads(metadata.get("sparselora_fx", "null"))
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise EstimatorError(
                f"cannot read the estimator {str(path)!r}: {error}; build and save it again"
            ) from error
        try:
            return _from_file(header, tensors)
        except EstimatorError as error:
            raise EstimatorError(
                f"{str(path)!r} {error}; build the estimator again and save it"
            ) from None

    def check(self, model: nn.Module) -> None:
        """Refuse a model other than the one the estimator was built from; the model is only read.

        Every frozen weight of ``model`` must be known and equal (if ``complete``; else those that
        are known, at least one). Extra entries are allowed: fewer weights may be frozen than when
        the estimator was built.

        Raises:
            EstimatorError: names the first weights that differ and the fix.
        """
        weights = _checked_weights(model)
        if not self.complete:
            known = [w for w in weights if w.canonical in self.factors]
            weights = known or weights
        self._compare(weights)

    def check_matches(self, model: nn.Module, names: Iterable[str]) -> None:
        """As ``check``, for some frozen weights only.

        Args:
            model: only read.
            names: of frozen weights, each ``FrozenWeight.name`` or ``FrozenWeight.canonical``.

        Raises:
            EstimatorError: also if the model has no frozen weight of such a name.
        """
        weights = _checked_weights(model)
        wanted = list(dict.fromkeys(names))
        have = {n for w in weights for n in (w.name, w.canonical)}
        unknown = [name for name in wanted if name not in have]
        if unknown:
            raise EstimatorError(
                f"the model has no frozen weight {shown(unknown)}; check the names, or freeze them"
            )
        chosen = set(wanted)
        self._compare([w for w in weights if chosen & {w.name, w.canonical}])

    def _compare(self, weights: list[FrozenWeight]) -> None:
        problems = [problem for w in weights if (problem := self._problem(w))]
        if problems:
            listed = shown(problems, quote=False)
            raise EstimatorError(
                f"the estimator does not belong to this model: {listed}; "
                "build it from this model with SVDEstimator.build(model), or load the base weights "
                "it was built from"
            )

    def _problem(self, weight: FrozenWeight) -> str | None:
        name = weight.canonical
        if name not in self.factors or name not in self.fingerprint:
            return f"{name} is not in the estimator"
        got, expected = fingerprint_of(weight.logical()), self.fingerprint[name]
        if got == expected:
            return None
        if got.split(":")[0] != expected.split(":")[0]:
            return f"{name} is {got.split(':')[0]}, the estimator has {expected.split(':')[0]}"
        return f"{name} has other values than the weight that was factored"


def _checked_weights(model: nn.Module) -> list[FrozenWeight]:
    weights = frozen_weights(model)
    if not weights:
        raise EstimatorError(
            "the model has no frozen linear weight; attach LoRA (get_peft_model) or freeze it first"
        )
    meta = [w.name for w in weights if w.weight.is_meta]
    if meta:
        raise EstimatorError(
            f"{shown(meta)} on the meta device, without values; load the real weights first"
        )
    return weights


def _checksum(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    rest = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for key in sorted(tensors):
        t = tensors[key]
        digest.update(f"{key}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_file(header: Any, tensors: dict[str, torch.Tensor]) -> SVDEstimator:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise EstimatorError("is no estimator file (its metadata does not say so)")
    if header.get("version") != _VERSION:
        raise EstimatorError(
            f"has format version {header.get('version')!r}, this release reads {_VERSION}"
        )
    prints, ranks = header.get("fingerprint"), header.get("ranks")
    if not isinstance(prints, dict) or not isinstance(ranks, dict) or prints.keys() != ranks.keys():
        raise EstimatorError("lacks its fingerprints or ranks")
    missing = [
        f"{name}.{part}" for name in prints for part in "ab" if f"{name}.{part}" not in tensors
    ]
    if missing or len(tensors) != 2 * len(prints):
        raise EstimatorError(
            f"lacks the tensors {shown(missing)}"
            if missing
            else "has tensors without a fingerprint"
        )
    if header.get("checksum") != _checksum(header, tensors):
        raise EstimatorError("is damaged (its checksum differs)")
    factors = {name: Factors(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in prints}
    return SVDEstimator(
        factors, prints, int(header.get("seed", 0)), bool(header.get("complete", True))
    )
