"""The benchmark of the dense phase runs, and its figures are of the right kind."""

from __future__ import annotations

import pytest

from benchmarks.online_calibration import cost
from benchmarks.support.presets import PRESETS


@pytest.mark.slow
def test_cost_of_the_tiny_preset() -> None:
    found = cost(PRESETS["tiny"], 4, "aot_eager")
    low, high = found["spread_cpu"]
    assert 0 < low <= found["ratio_cpu"] <= high
    # One sparse layer: two moments of 64 x 64 in float32, and vectors of 64 and 160.
    assert 2 * 64 * 64 * 4 < found["moments_mib"] * 2**20 < 4 * 64 * 64 * 4
    assert found["pause_s"] > 0 and found["step_cpu_s"] > 0
