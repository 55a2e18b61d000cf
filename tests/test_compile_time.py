"""The compile-time benchmark: which figures make which ratio."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import compile_time

SECONDS = {("plain", 8): 10.0, ("whole", 8): 12.0, ("regional", 8): 6.0, ("regional", 32): 7.5}


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process on the same caches takes a quarter of the first one's time."""
    seen: set[str] = set()

    def fresh(variant: str, layers: int, caches: str) -> dict[str, Any]:
        cold = caches not in seen
        seen.add(caches)
        seconds = SECONDS[variant, layers] * (1.0 if cold else 0.25)
        return {"seconds": seconds, "graphs": 2, "variant": variant, "layers": layers}

    monkeypatch.setattr(compile_time, "fresh", fresh)
    results = compile_time.run(8, 32)
    assert results["cold_ratio"] == 1.2 and results["cold_ratio_regional"] == 0.6
    assert results["depth_ratio_32_over_8"] == 1.25
    assert results["warm_over_cold"] == results["warm_over_cold_regional"] == 0.25
    assert [(r["variant"], r["cache"]) for r in results["rows"]].count(("plain", "cold")) == 1
