"""The step-time benchmark runs end to end and writes the face that others read."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import step_time
from benchmarks.support import measuring, peers, stepping
from benchmarks.support.presets import PRESETS

FACE = {
    "preset", "baseline", "ratio", "flop_ratio", "realised", "peers", "peak_memory_ratio",
    "estimator_share", "pairs", "machine", "versions",
}  # fmt: skip


@pytest.mark.slow
def test_tiny_preset_writes_the_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "face.json", tmp_path / "details.json"
    command = ["step_time", "--preset", "tiny", "--pairs", "3", "--backend", "aot_eager"]
    command += ["--json", str(files[0])]
    monkeypatch.setattr(sys, "argv", [*command, "--details", str(files[1])])
    step_time.main()
    face, details = (json.loads(file.read_text()) for file in files)
    assert set(face) == FACE and details["face"] == face
    assert face["preset"] == "tiny" and face["baseline"] == "peft+compile" and face["pairs"] == 3
    assert face["peers"]["peft+compile"] == 1 and face["peers"]["liger"] is None
    assert face["ratio"] > 0 and face["flop_ratio"] > 1 and face["estimator_share"] > 0
    assert face["realised"] == pytest.approx(face["ratio"] / face["flop_ratio"], rel=1e-2)
    for found in details["peers"].values():
        assert found["forward_ms"] > 0 and found["peak_memory_mib"] > 0


def test_turns_interleave_and_ratios_are_pairwise() -> None:
    order: list[str] = []

    class Fake(stepping.Peer):
        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.times, self.left, self.device = name, [], seconds, "cpu"

        def turn(self, batches: object) -> dict[str, float]:
            order.append(self.name)
            return {"step": self.left.pop(0)}

    a, b = Fake("a", [2.0, 8.0, 4.0]), Fake("b", [1.0, 2.0, 4.0])
    assert stepping.take_turns([a, b], [{}], 3, 60) == 3
    assert order == ["a", "b"] * 3
    assert stepping.ratio(b, a) == 2.0  # of 2, 4 and 1; the ratio of medians would be 2 / 1


def test_gpu_presets_have_the_papers_batches() -> None:
    assert PRESETS["llama3-8b"].batch == (8, 512, 128)
    assert PRESETS["llama2-13b"].for_task("CSR").batch == (8, 512, 3)
    assert PRESETS["llama3-8b"].for_task("MT-Bench").batch == (2, 2048, 512)
    with pytest.raises(SystemExit, match="allowed"):
        PRESETS["llama2-13b"].for_task("Code")


def test_default_plan_gives_levels() -> None:
    levels = PRESETS["llama32-1b"].levels()
    assert len(levels) == 16 and levels[0] == levels[-1] == (0.0, 0.0)
    assert (0.75, 0.25) in levels


def test_memory_counts_weights_and_activations() -> None:
    model = peers.dense(PRESETS["tiny"])
    batch = PRESETS["tiny"].batches()[0]
    weights = measuring.weight_bytes(model)
    peak = measuring.peak_memory(model, lambda: model(**batch).loss.backward())
    logits = 2 * 24 * 128 * 4
    assert peak > weights + 2 * logits
