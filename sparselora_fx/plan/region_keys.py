"""The keys by which a plan names exactly one region."""

from __future__ import annotations

from collections.abc import Sequence

from sparselora_fx.model.frozen_weights import canonical_path


def region_keys(where: str, sites: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The region's module, if it holds nothing else that is frozen; else each of its linears.

    Args:
        where: the region's module. sites: its frozen linears. names: all frozen linears.
    """
    inside = [name for name in names if name == where or name.startswith(f"{where}.")]
    if set(inside) == set(sites):
        return (canonical_path(where),)
    return tuple(canonical_path(name) for name in sites)
