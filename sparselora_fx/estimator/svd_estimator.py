"""The estimator: rank-r factors of every frozen weight, built once and kept in one file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.calibrate import Found, Settings, calibrate
from sparselora_fx.estimator.file_format import Contents, read, write
from sparselora_fx.estimator.low_rank import Factors, compute_device, plain_factors, ranks_of
from sparselora_fx.estimator.reference_files import read_spft
from sparselora_fx.estimator.statistics import DAMPING, Statistics, column_norms
from sparselora_fx.ir.score_ops import ACROSS
from sparselora_fx.model.frozen_weights import FrozenWeight, fingerprint_of, frozen_weights, shown
from sparselora_fx.model.opaque import refuse_opaque
from sparselora_fx.plan.score import DEFAULT, DEFAULT_CALIBRATED, Score, parse_score


@dataclass
class SVDEstimator:
    """Low-rank factors of every frozen weight, and what calibration added to them.

    Without calibration the training-free predictor of the SparseLoRA paper (arXiv 2506.16500): a
    truncated SVD of each weight. Keys are canonical names (``FrozenWeight.canonical``), equal with
    and without PEFT.

    Attributes:
        factors: per weight ``Factors`` on the CPU, in the dtype of the weight it was built from.
        fingerprint: per weight its shape and a cheap content hash, see ``fingerprint_of``.
        seed: seed of the randomised SVD; the same seed gives the same factors.
        complete: the factors cover every frozen weight of the model they were built from.
        statistics: per weight that calibration reached its ``Statistics``; empty without one.
        seconds: what building it took in this process; 0.0 for one that was loaded.
    """

    factors: dict[str, Factors]
    fingerprint: dict[str, str]
    seed: int = 0
    complete: bool = True
    statistics: dict[str, Statistics] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def calibrated(self) -> bool:
        """Whether calibration data went into it."""
        return bool(self.statistics)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        rank: int | Mapping[str, int] = 8,
        *,
        calibration: Iterable[Mapping[str, object]] | None = None,
        damping: float = DAMPING,
        layers_per_pass: int | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> SVDEstimator:
        """Factor every frozen weight of ``model``, which is only read.

        With ``calibration`` the factors are those that approximate the *outputs* on such inputs
        best (`statistics.aware_factors`), and the statistics that better scores need are kept.

        Args:
            model: with LoRA attached or base weights frozen; any floating dtype and device but
                meta.
            rank: one rank, or a mapping of dotted suffix (of a module or of anything around it; the
                deepest match wins, then the longer key) to rank; weights that no key names get 8. A
                weight smaller than its rank gets ``min(N, K)``.
            calibration: batches of the model's inputs (dicts of tensors): a list, a DataLoader, any
                iterable. Tokens with attention_mask 0 do not count. A few dozen texts suffice.
            damping: see `statistics.aware_factors`.
            layers_per_pass: inputs whose second moments are held at once (each K * K values for K
                input channels); the batches are read once per pass. None: as many as fit in 1 GiB.
            device: where to compute plain SVDs; None: CUDA if there is one, else where the weights
                are. On CUDA weights of equal shape are factored in batches.
            progress: show a progress bar.
            seed: seed of the randomised SVD.

        Raises:
            EstimatorError: no frozen weight, a weight on the meta device, a weight with inf or NaN,
                a rank that is no positive int or exceeds every weight that it applies to, a key
                that matches nothing, calibration without tokens or with inf or NaN.
        """
        begin = time.perf_counter()
        weights = _checked_weights(model)
        ranks = ranks_of(weights, rank)
        settings = Settings(damping, layers_per_pass, seed, progress)
        found: Iterable[Found] = ()
        if calibration is not None:
            found = calibrate(model, weights, ranks, calibration, settings)
        place = compute_device(device)
        built = assemble(weights, found, ranks, seed=seed, place=place, progress=progress)
        built.seconds = time.perf_counter() - begin
        return built

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

    def score_of(self, text: str | None) -> Score:
        """The score that a plan's ``score`` stands for with this estimator.

        Raises:
            EstimatorError: it looks at the prior, which only calibration gives.
        """
        default = DEFAULT_CALIBRATED if self.calibrated else DEFAULT
        score = parse_score(text or default)
        if score.prior and not self.calibrated:
            raise EstimatorError(
                f"the plan's score {text!r} needs a prior, which this estimator lacks: build it "
                "with SVDEstimator.build(model, calibration=batches), or drop 'prior'"
            )
        return score

    def vectors(
        self, weights: Iterable[FrozenWeight], score: Score
    ) -> dict[str, dict[str, Tensor]]:
        """What a score needs of each weight besides its factors, by canonical name.

        ``offset`` in the dtype of the weight; ``output``, ``prior`` and ``norms`` in float32 or
        float64. See `statistics.Statistics`. Where only a graph tells how a weight is stored,
        ``norms_across`` are its norms if it is stored ``[K, N]``.
        """
        table: dict[str, dict[str, Tensor]] = {}
        for w in weights:
            known = self.statistics.get(w.canonical)
            found: dict[str, Tensor] = {}
            if known is not None and len(known.offset):
                found["offset"] = known.offset.to(w.dtype)
            if known is not None and score.prior:
                found |= {"output": known.output} if len(known.output) else {}
                found["prior"] = known.share if score.normalised else known.input
            if score.weighted or score.normalised:
                found["norms"] = column_norms(w.logical()) if known is None else known.norms
                if known is None and not w.oriented:
                    found[ACROSS] = column_norms(w.logical().t())
            table[w.canonical] = found
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, replacing ``path`` atomically.

        It holds ``<name>.a`` and ``<name>.b`` for each weight, ``<name>.<field>`` for its
        statistics, and JSON metadata.

        Raises:
            EstimatorError: the file cannot be written.
        """
        write(
            path,
            Contents(self.factors, self.fingerprint, self.seed, self.complete, self.statistics),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SVDEstimator:
        """Read what ``save`` wrote; every byte is covered by a checksum.

        Raises:
            EstimatorError: no such file, a damaged file, another format or version, missing keys.
        """
        return cls(*read(path))

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
    refuse_opaque(model, len(weights), EstimatorError)
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


def assemble(
    weights: list[FrozenWeight],
    found: Iterable[Found],
    ranks: Mapping[str, int],
    *,
    seed: int = 0,
    place: torch.device | None = None,
    progress: bool = True,
    complete: bool = True,
) -> SVDEstimator:
    """The estimator of some weights: what calibration found of them, plain SVDs of the others."""
    found = list(found)
    factors = {w.canonical: pair for w, pair, _ in found if pair is not None}
    plain = [w for w in weights if w.canonical not in factors]
    factors |= plain_factors(plain, ranks, place, seed, progress=progress)
    return SVDEstimator(
        {w.canonical: factors[w.canonical] for w in weights},
        {w.canonical: fingerprint_of(w.logical()) for w in weights},
        seed,
        complete,
        {w.canonical: known for w, _, known in found},
    )
