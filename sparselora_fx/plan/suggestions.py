"""What a user may have meant: the closest allowed words, for the messages of plans."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sparselora_fx.errors import PlanError
from sparselora_fx.model.frozen_weights import FrozenWeight, canonical_path, suffix_distance


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Ask whether a close match was meant, or else list what is allowed (shortened)."""
    options = list(dict.fromkeys(allowed))
    close = difflib.get_close_matches(word, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(o) for o in options[:8]) + (", ..." if len(options) > 8 else "")
    return f"allowed: {shown or 'nothing'}"


def unknown_layer(key: str, frozen: list[FrozenWeight], module_names: Iterable[str]) -> PlanError:
    """The error for a plan's key that covers no frozen weight, with the nearest keys that would."""
    exists = any(suffix_distance(key, name) == 0 for name in module_names)
    why = (
        "matches a module that holds no frozen weight"
        if exists
        else "matches no module of this model"
    )
    valid: dict[str, None] = {}
    for w in frozen:
        parts = canonical_path(w.name).split(".")
        for end in range(len(parts), 0, -1):
            valid.setdefault(".".join(parts[max(0, end - len(key.split("."))) : end]))
    if not frozen:
        return PlanError(
            f"the plan's key {key!r} {why}: the model has no frozen weight; attach LoRA first"
        )
    return PlanError(f"the plan's key {key!r} {why}; {nearest(key, valid)}")
