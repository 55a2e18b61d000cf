"""What each field of a plan may hold."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

from sparselora_fx.errors import PlanError
from sparselora_fx.plan.suggestions import nearest

TOKENS = ("all", "context")
STRUCTURAL = "default"
DEFAULTS = {
    "tokens": "context", "start_step": 0.05, "end_step": None, "channel_multiple": 16, "rank": None,
    "ramp": None, "sink_tokens": 0, "sparse_outputs": 0.0, "score": None, "track_adapter": False,
    "calibrate": None, "refresh": None, "min_sparse": 0.05, "min_steps": 0,
    "max_loss_gap": None,
}  # fmt: skip


def check_sparsity(value: object) -> float | dict[str, float] | str:
    if isinstance(value, str) and value == STRUCTURAL:
        return value
    if not isinstance(value, Mapping):
        return check_fraction("sparsity", value)
    for key in value:
        if not isinstance(key, str) or not all(key.split(".")):
            raise PlanError(
                f"the key {key!r} is no module name; expected a dotted name such as 'layers.1.mlp'"
            )
    return {key: check_fraction(f"the sparsity of {key!r}", s) for key, s in value.items()}


def check_fraction(what: str, value: object) -> float:
    if not isinstance(value, bool) and isinstance(value, numbers.Real) and 0 <= float(value) < 1:
        return float(value)
    raise PlanError(f"{what} is {value!r}; allowed: a number in [0, 1), where 0 is dense")


def check_positive(what: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise PlanError(f"{what} is {value!r}; allowed: a positive int")


def check_tokens(value: object) -> object:
    if callable(value) or (isinstance(value, str) and value in TOKENS):
        return value
    raise PlanError(f"tokens is {value!r}; {nearest(str(value), TOKENS)}")


def check_gap(value: object) -> float | None:
    """How far the loss may be from the dense loss, in nats; None: nobody watches."""
    if value is None:
        return None
    if not isinstance(value, bool) and isinstance(value, numbers.Real) and float(value) > 0:
        return float(value)
    raise PlanError(f"max_loss_gap is {value!r}; allowed: a number of nats above 0, or None")
