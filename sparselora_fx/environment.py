"""The environment settings; this file alone reads them."""

from __future__ import annotations

import os
from pathlib import Path

from sparselora_fx.errors import CompileError

DEBUG_BOUNDS = "SPARSELORA_DEBUG_BOUNDS"
KERNEL_TABLE = "SPARSELORA_KERNEL_TABLE"
DISABLED_PASSES = "SPARSELORA_DISABLED_PASSES"
DISABLED_LAYERS = "SPARSELORA_DISABLED_LAYERS"
# Below the passes, and above the backend.
LAYERS = ("pieces", "cuda_graphs", "templates", "shared_launches")


def given(name: str) -> str:
    """What a setting says; "" if it is not set."""
    return os.environ.get(name, "")


def check_bounds() -> bool:
    """Whether kernels assert that every index they gather with is in range:
    ``SPARSELORA_DEBUG_BOUNDS=1``."""
    value = os.environ.get(DEBUG_BOUNDS, "0")
    if value not in ("0", "1"):
        raise CompileError(f"{DEBUG_BOUNDS} must be 0 or 1, got {value!r}")
    return value == "1"


def kernel_table() -> Path | None:
    """The table of measured kernels to use in place of ours: ``SPARSELORA_KERNEL_TABLE``."""
    value = os.environ.get(KERNEL_TABLE)
    return Path(value) if value else None


def disabled_passes() -> tuple[str, ...]:
    """Names of passes to leave out, joined by commas: ``SPARSELORA_DISABLED_PASSES``."""
    names = os.environ.get(DISABLED_PASSES, "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def disabled_layers() -> frozenset[str]:
    """Layers of the stack to leave out, of `LAYERS`, joined by commas:
    ``SPARSELORA_DISABLED_LAYERS``."""
    asked = [name.strip() for name in os.environ.get(DISABLED_LAYERS, "").split(",")]
    for name in filter(None, asked):
        if name not in LAYERS:
            allowed = ", ".join(LAYERS)
            raise CompileError(f"{DISABLED_LAYERS} names {name!r}; layers that may go: {allowed}")
    return frozenset(filter(None, asked))


def shares_launches(device: str) -> bool:
    """Whether launches are to be few on a kind of device: on a GPU, unless `disabled_layers` says
    no. What generates a GPU's code without one replaces this function."""
    return device == "cuda" and "shared_launches" not in disabled_layers()
