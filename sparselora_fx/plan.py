"""Sparsity plans: how sparse each layer is, for which tokens and from which step on."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .budget import choose
from .errors import PlanError
from .frozen import FrozenWeight, block_positions, suffix_distance
from .hints import nearest, unknown_layer
from .schedule import When, check_calibrate, check_ramp, check_refresh, check_schedule
from .scores import check_flag, check_score
from .sensitivity_table import SensitivityTable

TOKENS = ("all", "context")
_DEFAULT = "default"
_DEFAULTS = {
    "tokens": "context", "start_step": 0.05, "end_step": None, "channel_multiple": 16, "rank": None,
    "ramp": None, "sink_tokens": 0, "sparse_outputs": 0.0, "score": None, "track_adapter": False,
    "calibrate": None, "refresh": None, "min_sparse": 0.05,
}  # fmt: skip
_OWN_KEYS = ("sparsity", *_DEFAULTS)
_REFERENCE_KEYS = ("mode", "skip_output_tokens", "ffn_sparsity", "qkvo_sparsity")


class Sparsity(NamedTuple):
    """Fraction of channels skipped, by the kind of region that a weight is in; 0.0 is dense."""

    ffn: float
    attention: float


@dataclass(frozen=True, init=False)
class SparsityPlan:
    """Per-layer sparsity, token policy and schedule. Immutable; read by ``compile``.

    Keys of ``sparsity`` match module names by dotted suffix: ``"layers.1.mlp"`` matches
    ``"base_model.model.model.layers.1.mlp"`` but neither ``"xlayers.1.mlp"`` nor
    ``"layers.11.mlp"``. A key applies to every frozen weight inside the module. A suffix shared by
    several modules (``"mlp"``) applies to all of them. Where several keys cover a weight, the
    deepest module wins, then the longer key. Layers that no key covers stay dense.

    Attributes:
        sparsity: one number for every layer, a mapping of key to number, or ``"default"``.
        tokens: ``"context"``: tokens whose prediction carries loss are dense, the others sparse;
            ``"all"``: every token is sparse; or a function of the call's arguments (a dict) that
            returns ``bool[B, L]``, true where sparse. Calls without labels: every token is sparse.
        start_step: training stays dense before it; an int counts optimizer steps, a float is a
            fraction of training (0.05 as in the reference implementation).
        end_step: training is dense again from it on (None: never); same units.
        ramp: stages ``(from step, share of the plan's sparsity)``; before the first, dense.
        channel_multiple: the number of kept channels is rounded up to a multiple of this.
        rank: rank of the estimator that the plan was written for, where the file says so.
        sink_tokens: this many first tokens of each sample are dense.
        sparse_outputs: this fraction of the output tokens is sparse after all, evenly spread.
        score: what makes a channel worth keeping, see `scores.WORDS`; None: as the estimator allows
        track_adapter: score with W + s B A as it is now, not with the frozen W alone.
        calibrate: "dense_phase": build the estimator from what the dense first steps read; or None.
        refresh: calibrate again every n steps, from n / 20 dense ones (see `schedule.refreshes`).
        min_sparse: a call in which a smaller share of the tokens is sparse (0.05) runs dense.
    """

    sparsity: float | dict[str, float] | str
    tokens: str | Callable[[dict[str, Any]], Any]
    start_step: When
    end_step: When | None
    channel_multiple: int
    rank: int | None
    ramp: tuple[tuple[When, float], ...]
    sink_tokens: int
    sparse_outputs: float
    score: str | None
    track_adapter: bool
    calibrate: str | None
    refresh: int | None
    min_sparse: float

    def __init__(
        self, sparsity: float | Mapping[str, float] | str | os.PathLike[str], **options: Any
    ) -> None:
        """Check and keep the values; ``sparsity`` may also be the path of a YAML file.

        Keywords are the attributes above. One left out, or None, takes the file's value, else its
        default: tokens "context", start_step 0.05, channel_multiple 16, the others off.

        Raises:
            PlanError: an unknown keyword, any value out of range, or a missing or malformed file.
        """
        for key in options:
            if key not in _DEFAULTS:
                raise PlanError(f"unknown option {key!r}; {nearest(key, _DEFAULTS)}")
        values: dict[str, Any] = dict(_DEFAULTS)
        if isinstance(sparsity, os.PathLike) or (
            isinstance(sparsity, str) and sparsity != _DEFAULT
        ):
            values |= _read_yaml(Path(sparsity))
        else:
            values["sparsity"] = sparsity
        values |= {k: v for k, v in options.items() if v is not None}
        values["start_step"], values["end_step"] = check_schedule(
            values["start_step"], values["end_step"]
        )
        checks: dict[str, Callable[[Any], Any]] = {
            "sparsity": _check_sparsity,
            "tokens": _check_tokens,
            "ramp": check_ramp,
            "channel_multiple": lambda v: _check_positive("channel_multiple", v),
            "rank": lambda v: None if v is None else _check_positive("rank", v),
            "sink_tokens": lambda v: 0 if v == 0 else _check_positive("sink_tokens", v),
            "sparse_outputs": lambda v: _check_fraction("sparse_outputs", v),
            "score": check_score,
            "track_adapter": lambda v: check_flag("track_adapter", v),
            "calibrate": check_calibrate,
            "min_sparse": lambda v: _check_fraction("min_sparse", v),
            "refresh": lambda v: check_refresh(v, values["calibrate"]),
        }
        for key in _OWN_KEYS:
            value = checks.get(key, lambda v: v)(values[key])
            object.__setattr__(self, key, value)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> SparsityPlan:
        """Read a plan written by ``to_yaml`` or a file of the reference implementation.

        Of the latter, ``mode: svd_8`` becomes ``rank=8``, ``mode: dense`` sets every layer to 0,
        ``skip_output_tokens: True`` becomes ``tokens="context"``; ``ffn_sparsity`` and
        ``qkvo_sparsity`` (labels there, without effect) are ignored.

        Raises:
            PlanError: no such file, not YAML, an unknown key or a value out of range.
        """
        return cls(Path(path))

    @classmethod
    def default(cls) -> SparsityPlan:
        """A conservative plan by structure alone.

        In the repeated blocks of the model the first quarter (at least one) and the last stay
        dense, as the paper finds early layers sensitive; the others get 0.75 in FFN and 0.25 in
        attention regions. Weights outside the blocks stay dense. A model without numbered blocks
        gets 0.5 in FFN regions and 0 in attention.
        """
        return cls(_DEFAULT)

    @classmethod
    def from_sensitivity(
        cls,
        table: SensitivityTable,
        *,
        flops: float | None = None,
        max_loss: float | None = None,
        **options: Any,
    ) -> SparsityPlan:
        """The best plan under one budget that a table of `sensitivity` allows; see ``budget``.

        Args:
            table: its token policy and ``channel_multiple`` are taken over.
            flops: keep at most this share of the base FLOPs of a sparse token, at the least loss.
            max_loss: the regions' absolute loss changes sum to at most this, at the least FLOPs.
            options: further attributes of the plan, such as ``start_step``.

        Raises:
            PlanError: not exactly one budget, or one that no choice of levels meets.
        """
        found = choose(table, flops=flops, max_loss=max_loss)
        if table.tokens is None and "tokens" not in options:
            raise PlanError("the table was measured with a function as token policy: pass tokens=")
        same = {"tokens": table.tokens, "channel_multiple": table.channel_multiple}
        return cls(found.sparsity(), **(same | options))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; ``SparsityPlan(**plan.to_dict()) == plan``."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, dict) else self.sparsity
        values = {key: getattr(self, key) for key in _DEFAULTS}
        return {"sparsity": sparsity} | values | {"ramp": [list(stage) for stage in self.ramp]}

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` as YAML; ``from_yaml`` reads it back to an equal plan."""
        try:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write the plan to {str(path)!r}: {error}") from error

    def resolve(
        self, frozen: list[FrozenWeight], module_names: Iterable[str]
    ) -> dict[str, Sparsity]:
        """Map the ``name`` of every frozen weight to its sparsity.

        Both fields are equal unless this is the default plan; 0.0 where the plan says nothing.

        Args:
            frozen: from ``frozen_weights(model)``.
            module_names: all names in ``model.named_modules()``, used to explain a key that covers
                nothing.

        Raises:
            PlanError: a key covers no frozen weight; names the nearest keys that would.
        """
        if isinstance(self.sparsity, str):
            return _structural_default(frozen)
        if isinstance(self.sparsity, float):
            return {w.name: Sparsity(self.sparsity, self.sparsity) for w in frozen}
        best: dict[str, tuple[int, int, float]] = {}
        for key, value in self.sparsity.items():
            covered = False
            for w in frozen:
                distances = [suffix_distance(key, name) for name in (w.name, *w.shared)]
                hits = [d for d in distances if d is not None]
                if hits:
                    covered = True
                    rank = (min(hits), -len(key.split(".")), value)
                    best[w.name] = min(best.get(w.name, rank), rank, key=lambda r: r[:2])
            if not covered:
                raise unknown_layer(key, frozen, module_names)
        values = {w.name: best[w.name][2] if w.name in best else 0.0 for w in frozen}
        return {name: Sparsity(value, value) for name, value in values.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(
            f"cannot read the plan {str(path)!r}: {error}; expected the path of a YAML file"
        ) from error
    for key in data if isinstance(data, dict) else ():
        if key not in _OWN_KEYS + _REFERENCE_KEYS:
            hint = nearest(str(key), _OWN_KEYS + _REFERENCE_KEYS)
            raise PlanError(f"{str(path)!r} has the unknown key {key!r}; {hint}")
    if not isinstance(data, dict) or "sparsity" not in data:
        raise PlanError(
            f"{str(path)!r} is no plan; expected a YAML mapping with the key 'sparsity'"
        )
    mode, skip = data.pop("mode", None), data.pop("skip_output_tokens", None)
    values = {key: value for key, value in data.items() if key in _OWN_KEYS}
    if skip is not None and not isinstance(skip, bool):
        raise PlanError(f"skip_output_tokens is {skip!r}; allowed: true, false")
    implied = "context" if skip else "all"
    if skip is not None and values.setdefault("tokens", implied) != implied:
        raise PlanError(f"skip_output_tokens contradicts tokens: {values['tokens']!r}; keep one")
    if mode == "dense":
        checked = _check_sparsity(values["sparsity"])
        values["sparsity"] = dict.fromkeys(checked, 0.0) if isinstance(checked, dict) else 0.0
    elif mode is not None:
        match = re.fullmatch(r"svd_([1-9]\d*)", str(mode))
        if match is None:
            raise PlanError(f"mode is {mode!r}; allowed: 'dense', or 'svd_<rank>' such as 'svd_8'")
        values.setdefault("rank", int(match[1]))
    return values


def _check_sparsity(value: Any) -> float | dict[str, float] | str:
    if isinstance(value, str) and value == _DEFAULT:
        return value
    if not isinstance(value, Mapping):
        return _check_fraction("sparsity", value)
    for key in value:
        if not isinstance(key, str) or not all(key.split(".")):
            raise PlanError(
                f"the key {key!r} is no module name; expected a dotted name such as 'layers.1.mlp'"
            )
    return {key: _check_fraction(f"the sparsity of {key!r}", s) for key, s in value.items()}


def _check_fraction(what: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, numbers.Real) and 0 <= float(value) < 1:
        return float(value)
    raise PlanError(f"{what} is {value!r}; allowed: a number in [0, 1), where 0 is dense")


def _check_positive(what: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise PlanError(f"{what} is {value!r}; allowed: a positive int")


def _check_tokens(value: Any) -> Any:
    if callable(value) or (isinstance(value, str) and value in TOKENS):
        return value
    raise PlanError(f"tokens is {value!r}; {nearest(str(value), TOKENS)}")


def _structural_default(frozen: list[FrozenWeight]) -> dict[str, Sparsity]:
    places = block_positions(frozen)
    if not places:
        return {w.name: Sparsity(0.5, 0.0) for w in frozen}
    result = {w.name: Sparsity(0.0, 0.0) for w in frozen}
    for name, (position, count) in places.items():
        if max(1, count // 4) <= position < count - 1:
            result[name] = Sparsity(0.75, 0.25)
    return result
