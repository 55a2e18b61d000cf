"""The environment settings of the lowerings; this file alone reads them."""

from __future__ import annotations

import os

DEBUG_BOUNDS = "SPARSELORA_DEBUG_BOUNDS"


def check_bounds() -> bool:
    """Whether kernels assert that every index they gather with is in range:
    ``SPARSELORA_DEBUG_BOUNDS=1``."""
    value = os.environ.get(DEBUG_BOUNDS, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{DEBUG_BOUNDS} must be 0 or 1, got {value!r}")
    return value == "1"


def settings() -> str:
    """All settings that change generated code, as a string for cache keys."""
    return f"check_bounds={check_bounds()}"
