"""Dense and sparse fine-tuning on a quantised base: runs that a file holds, and the table of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import quantised_quality


@pytest.mark.slow
def test_what_a_file_holds_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "found.json"
    sizes = {"steps": 1, "batch": 2, "tests": 1, "problems": 2, "seeds": 1}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    monkeypatch.setattr(
        sys, "argv", ["quality", "--json", str(file), "--backend", "eager", *options]
    )
    quantised_quality.main()
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    ran = [(run["base"], run["way"]) for run in runs]
    assert ran == [("nf4", "dense"), ("nf4", "sparse"), ("fp32", "dense"), ("fp32", "sparse")]
    assert all(0 < run["loss"] < 5 and 0 <= run["accuracy"] <= 1 for run in runs)
    quantised_quality.main()
    assert json.loads(file.read_text(encoding="utf-8"))["runs"] == runs


def test_the_table_pairs_runs_of_a_seed() -> None:
    rows = [
        {"base": "nf4", "way": way, "seed": seed, "loss": loss + 0.1 * seed, "accuracy": right}
        for way, loss, right in (("dense", 0.3, 0.5), ("sparse", 0.31, 0.4))
        for seed in range(3)
    ]
    text = quantised_quality.table({"runs": rows})
    assert "| nf4 | sparse - dense | 0.0100 ± 0.0000 | -10.0% ± 0.0% |" in text
    assert "| fp32 | dense | - | - |" in text


def test_the_page_shows_the_committed_table() -> None:
    root = Path(quantised_quality.__file__).parent
    found = json.loads((root / "results/quantised_quality.json").read_text(encoding="utf-8"))
    page = (root.parent / "docs/quantised_bases.md").read_text(encoding="utf-8")
    assert quantised_quality.table(found) in page
