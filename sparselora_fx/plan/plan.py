"""Sparsity plans: how sparse each layer is, for which tokens and from which step on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sparselora_fx.errors import PlanError
from sparselora_fx.model.blocks import block_positions
from sparselora_fx.model.frozen_weights import FrozenWeight, suffix_distance
from sparselora_fx.plan.budget import choose
from sparselora_fx.plan.checks import (
    DEFAULTS,
    STRUCTURAL,
    check_fraction,
    check_gap,
    check_positive,
    check_sparsity,
    check_tokens,
)
from sparselora_fx.plan.domain_tables import DomainTables
from sparselora_fx.plan.plan_file import OWN_KEYS, read_plan
from sparselora_fx.plan.schedule import (
    When,
    check_calibrate,
    check_ramp,
    check_refresh,
    check_schedule,
)
from sparselora_fx.plan.score import check_flag, check_score
from sparselora_fx.plan.sensitivity_table import SensitivityTable
from sparselora_fx.plan.suggestions import nearest, unknown_layer

# Steps from which on an automatic plan is sparse. Trainings of 40 steps lost by it on one
# task of four, and shorter ones than this end with a higher loss (docs/evidence.md); the paper's,
# which do not, have thousands of steps.
LONG_ENOUGH = 1000


class Sparsity(NamedTuple):
    """Fraction of channels skipped, by the kind of region that a weight is in; 0.0 is dense."""

    ffn: float
    attention: float

    def scaled(self, share: float, *, at_most: Sparsity | None = None) -> Sparsity:
        """This share of it, but no more than ``at_most``."""
        most = at_most or Sparsity(1.0, 1.0)
        return Sparsity(
            min(self.ffn * share, most.ffn), min(self.attention * share, most.attention)
        )


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
        ramp: stages ``(from step, sparsity scale)``; before the first, dense.
        channel_multiple: the number of kept channels is rounded up to a multiple of this.
        rank: rank of the estimator that the plan was written for, where the file says so.
        sink_tokens: this many first tokens of each sample are dense.
        sparse_outputs: this fraction of the output tokens is sparse after all, evenly spread.
        score: what makes a channel worth keeping, see `score.TERMS`; None: as the estimator allows
        track_adapter: score with W + s B A as it is now, not with the frozen W alone.
        calibrate: "dense_phase": build the estimator from what the dense first steps read; or None.
        refresh: calibrate again every n steps, from n / 20 dense ones (see `schedule.refreshes`).
        min_sparse: a call in which a smaller share of the tokens is sparse (0.05) runs dense.
        min_steps: a training that is known to have fewer optimizer steps (0) stays dense.
        max_loss_gap: start with a part of the plan and climb while the loss stays this close to the
            dense loss (nats a token); see `auto`.
    """

    sparsity: float | dict[str, float] | str
    tokens: str | Callable[[dict[str, Any]], object]
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
    min_steps: int
    max_loss_gap: float | None

    def __init__(
        self, sparsity: float | Mapping[str, float] | str | os.PathLike[str], **options: object
    ) -> None:
        """Check and keep the values; ``sparsity`` may also be the path of a YAML file.

        Keywords are the attributes above. One left out, or None, takes the file's value, else its
        default: tokens "context", start_step 0.05, channel_multiple 16, the others off.

        Raises:
            PlanError: an unknown keyword, any value out of range, or a missing or malformed file.
        """
        for key in options:
            if key not in DEFAULTS:
                raise PlanError(f"unknown option {key!r}; {nearest(key, DEFAULTS)}")
        values: dict[str, object] = dict(DEFAULTS)
        if isinstance(sparsity, os.PathLike) or (
            isinstance(sparsity, str) and sparsity != STRUCTURAL
        ):
            values |= read_plan(Path(sparsity))
        else:
            values["sparsity"] = sparsity
        values |= {k: v for k, v in options.items() if v is not None}
        values["start_step"], values["end_step"] = check_schedule(
            values["start_step"], values["end_step"]
        )
        checks: dict[str, Callable[[Any], object]] = {
            "sparsity": check_sparsity,
            "tokens": check_tokens,
            "ramp": check_ramp,
            "channel_multiple": lambda v: check_positive("channel_multiple", v),
            "rank": lambda v: None if v is None else check_positive("rank", v),
            "sink_tokens": lambda v: 0 if v == 0 else check_positive("sink_tokens", v),
            "sparse_outputs": lambda v: check_fraction("sparse_outputs", v),
            "score": check_score,
            "track_adapter": lambda v: check_flag("track_adapter", v),
            "calibrate": check_calibrate,
            "min_sparse": lambda v: check_fraction("min_sparse", v),
            "min_steps": lambda v: 0 if v == 0 else check_positive("min_steps", v),
            "refresh": lambda v: check_refresh(v, values["calibrate"]),
            "max_loss_gap": check_gap,
        }
        for key in OWN_KEYS:
            value = values[key]
            object.__setattr__(self, key, checks[key](value) if key in checks else value)

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
        return cls(STRUCTURAL)

    @classmethod
    def auto(cls, max_loss_gap: float = 0.01, **options: Any) -> SparsityPlan:
        """The default plan, entered in stages: feed-forwards of the last blocks first, then of more
        blocks, then attention; in a training of at least `LONG_ENOUGH` steps.

        ``compile`` watches a model with such a plan (`Watch` with mode "adapt", unless it is given
        another): each stage must be quiet before the next begins, a region that drifts steps down,
        and a stage that drifts at once is left for good. ``drift(model).plan`` is the plan that
        training ended on.

        Args:
            max_loss_gap: tolerance, in nats per output token.
            options: attributes of the plan; ``sparsity`` sets another ceiling than the default's.

        Raises:
            PlanError: an option out of range.
        """
        sparsity = options.pop("sparsity", STRUCTURAL)
        options.setdefault("min_steps", LONG_ENOUGH)
        return cls(sparsity, max_loss_gap=max_loss_gap, **options)

    @classmethod
    def from_sensitivity(
        cls,
        table: SensitivityTable | DomainTables,
        *,
        flops: float | None = None,
        max_loss: float | None = None,
        worst_case: bool = False,
        **options: object,
    ) -> SparsityPlan:
        """The best plan under one budget that a table of `sensitivity` allows; see ``budget``.

        Args:
            table: its token policy and ``channel_multiple`` are taken over.
            flops: keep at most this share of the base FLOPs of a sparse token, at the least loss.
            max_loss: the regions' absolute loss changes sum to at most this, at the least FLOPs.
            worst_case: needed for the tables of several domains: every one keeps the budget.
            options: further attributes of the plan, such as ``start_step``.

        Raises:
            PlanError: not exactly one budget, or one that no choice of levels meets.
        """
        if isinstance(table, DomainTables) != worst_case:
            raise PlanError(
                f"worst_case is {worst_case!r} for a {type(table).__name__}; pass worst_case=True "
                "with the tables of several domains, and with those alone"
            )
        if isinstance(table, DomainTables):
            table = table.worst_case()
        found = choose(table, flops=flops, max_loss=max_loss)
        if table.tokens is None and "tokens" not in options:
            raise PlanError("the table was measured with a function as token policy: pass tokens=")
        same = {"tokens": table.tokens, "channel_multiple": table.channel_multiple}
        return cls(found.sparsity(), **(same | options))

    def too_short(self, total: int | None) -> bool:
        """Whether a training of so many steps stays dense; one of unknown length does not."""
        return total is not None and total < self.min_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; ``SparsityPlan(**plan.to_dict()) == plan``."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, dict) else self.sparsity
        values = {key: getattr(self, key) for key in DEFAULTS}
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


def _structural_default(frozen: list[FrozenWeight]) -> dict[str, Sparsity]:
    places = block_positions(frozen)
    if not places:
        return {w.name: Sparsity(0.5, 0.0) for w in frozen}
    result = {w.name: Sparsity(0.0, 0.0) for w in frozen}
    for name, (position, count) in places.items():
        if max(1, count // 4) <= position < count - 1:
            result[name] = Sparsity(0.75, 0.25)
    return result
