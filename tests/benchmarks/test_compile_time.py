"""The compile-time benchmark: which figures make which ratio."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import compile_time

SECONDS = {"plain": 1.0, "whole": 0.25, "regional": 0.1}  # a layer; ours also start at 10


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process on the same caches takes a quarter of the first one's time."""
    seen: set[str] = set()

    def fresh(variant: str, layers: int, caches: str) -> dict[str, Any]:
        cold = caches not in seen
        seen.add(caches)
        start = 0.0 if variant == "plain" else 10.0
        seconds = (start + SECONDS[variant] * layers) * (1.0 if cold else 0.25)
        return {"seconds": seconds, "graphs": 2, "variant": variant, "layers": layers}

    monkeypatch.setattr(compile_time, "fresh", fresh)
    results = compile_time.run((8, 16, 32))
    assert results["cold_ratio"] == 14 / 16
    assert results["cold_ratio_by_layers"] == {8: 12 / 8, 16: 14 / 16, 32: 18 / 32}
    assert results["depth_ratio_32_over_8"] == 18 / 12
    assert results["warm_over_cold"] == 0.25
    regional = results["regional"]
    assert regional == {"cold_ratio": 10.8 / 8, "depth_ratio": 13.2 / 10.8, "warm_over_cold": 0.25}
    assert [(r["variant"], r["cache"]) for r in results["rows"]].count(("plain", "cold")) == 3
