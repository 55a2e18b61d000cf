"""The benchmark of host time splits a call, and every part of it is somebody's."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.host_time import Clocks, measure

ROOT = Path(__file__).parents[2]


def test_every_kind_of_call_is_measured() -> None:
    found = measure(layers=1, calls=2)
    assert set(found) == {"dense", "dense_counted", "sparse", "sparse_counted"}
    for row in found.values():
        assert row["ours_ms"] > 0 and row["dynamo_ms"] > 0


def test_a_call_is_split_by_who_spends_it() -> None:
    clocks = Clocks()
    clocks.whole.spent, clocks.rest.spent, clocks.graph.spent = 8.0, 3.0, 2.0
    assert clocks.split(10.0) == (10.0 - 8.0 + 1.0, 8.0 - 3.0)
    clocks.rest.spent = 0.0  # a dense graph, which nothing of ours surrounds
    assert clocks.split(10.0) == (2.0, 6.0)


def test_the_page_shows_the_committed_table() -> None:
    found = json.loads((ROOT / "benchmarks/results/host_time.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for kind, row in found["cases"].items():
        name = kind.replace("_counted", ", *counted*")
        assert f"| {name} | {row['ours_ms']:.2f} ms | {row['dynamo_ms']:.1f} ms |" in page
        assert row["ours_ms"] <= 1.0  # the bar for 32 layers
