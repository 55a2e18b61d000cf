"""Read a plan from YAML."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from sparselora_fx.errors import PlanError
from sparselora_fx.plan.checks import DEFAULTS, check_sparsity
from sparselora_fx.plan.suggestions import nearest

OWN_KEYS = ("sparsity", *DEFAULTS)
_REFERENCE_KEYS = ("mode", "skip_output_tokens", "ffn_sparsity", "qkvo_sparsity")


def read_plan(path: Path) -> dict[str, object]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(
            f"cannot read the plan {str(path)!r}: {error}; expected the path of a YAML file"
        ) from error
    for key in data if isinstance(data, dict) else ():
        if key not in OWN_KEYS + _REFERENCE_KEYS:
            hint = nearest(str(key), OWN_KEYS + _REFERENCE_KEYS)
            raise PlanError(f"{str(path)!r} has the unknown key {key!r}; {hint}")
    if not isinstance(data, dict) or "sparsity" not in data:
        raise PlanError(
            f"{str(path)!r} is no plan; expected a YAML mapping with the key 'sparsity'"
        )
    mode, skip = data.pop("mode", None), data.pop("skip_output_tokens", None)
    values = {key: value for key, value in data.items() if key in OWN_KEYS}
    if skip is not None and not isinstance(skip, bool):
        raise PlanError(f"skip_output_tokens is {skip!r}; allowed: true, false")
    implied = "context" if skip else "all"
    if skip is not None and values.setdefault("tokens", implied) != implied:
        raise PlanError(f"skip_output_tokens contradicts tokens: {values['tokens']!r}; keep one")
    if mode == "dense":
        checked = check_sparsity(values["sparsity"])
        values["sparsity"] = dict.fromkeys(checked, 0.0) if isinstance(checked, dict) else 0.0
    elif mode is not None:
        match = re.fullmatch(r"svd_([1-9]\d*)", str(mode))
        if match is None:
            raise PlanError(f"mode is {mode!r}; allowed: 'dense', or 'svd_<rank>' such as 'svd_8'")
        values.setdefault("rank", int(match[1]))
    return values
