"""The GPU suite without a GPU: its presets, its processes, and a toy of it from end to end."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Suite, parsed
from benchmarks.support import measuring, suite_case, suite_correctness
from benchmarks.support.peers import Family, dense, random_estimator, why_not
from benchmarks.support.presets import PRESETS
from benchmarks.support.stepping import Peer
from benchmarks.support.suite_case import MARK
from benchmarks.support.suite_jobs import (
    CORRECTNESS,
    Job,
    compile_until,
    jobs_of,
    memory_need,
    peers_of,
)
from benchmarks.support.suite_presets import SUITE, flop_share, preset_of, thinned

# ---------------------------------------------------------------- presets


def test_fewer_layers_keep_the_proportions() -> None:
    whole, short = SUITE["8b-math10k"], preset_of("8b-math10k", 8)
    assert short.shape["vocab_size"] == 32064  # a quarter of the head with a quarter of the layers
    assert sum(ffn > 0 for ffn, _ in short.levels()) == 7  # 28 of 32
    assert flop_share(short) == pytest.approx(flop_share(whole), abs=0.01)
    assert preset_of("1b-default").shape == PRESETS["llama32-1b"].shape


def test_thinning_spaces_layers_evenly() -> None:
    levels = [(layer / 100, 0.0) for layer in range(12)]
    chosen = [round(100 * ffn) for ffn, _ in thinned(levels, 4)]
    assert {b - a for a, b in itertools.pairwise(chosen)} == {3}


def test_flop_shares_are_close_to_the_counted_ones() -> None:
    """docs/performance.md has them from the rewritten graphs, choice of channels included."""
    counted = {"8b-math10k": 0.484, "8b-csr": 0.682, "8b-code": 0.679, "13b-math10k": 0.690}
    for name, share in counted.items():
        assert flop_share(SUITE[name]) == pytest.approx(share, abs=0.012), name
    assert 0.35 < flop_share(SUITE["8b-37"]) < 0.37


def test_an_hour_is_not_needed_to_time_all() -> None:
    until = compile_until(0, 480, len(SUITE))
    assert 200 < until < 368
    assert all(memory_need(n, ["peft+compile", "ours"], None) < 40 for n in SUITE)


# ---------------------------------------------------------------- peers


def test_what_cannot_run_says_why() -> None:
    assert why_not("peft+compile", "cpu") is None and why_not("ours+trim+whole", "cpu") is None
    assert "NVIDIA" in str(why_not("liger", "cpu"))
    assert "NVIDIA" in str(why_not("peft+compile+cudagraphs", "cpu"))
    for option in ("cudagraphs", "verify"):
        reason = why_not(f"ours+{option}", "cpu")
        assert reason is None or "slx.compile has no option" in reason


def in_bfloat16() -> Any:
    """A toy whose base is in bf16 and whose adapters are in fp32."""
    return replace(PRESETS["tiny"], dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["reference", "reference-cut"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_the_reference_trains_on_a_base_in_bf16(name: str, autocast: torch.dtype | None) -> None:
    preset = in_bfloat16()
    model = Family(preset).make(name)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    peer = Peer(name, model, autocast=autocast)
    for batch in preset.batches(2):
        peer.turn([batch])
    changed = [n for n, p in model.named_parameters() if n in before and (p != before[n]).any()]
    assert len(changed) == len(before)


def test_the_reference_under_autocast_is_dense_peft_where_nothing_is_sparse() -> None:
    from benchmarks.support import reference

    preset = in_bfloat16()
    model = dense(preset)
    batch = preset.batches(1)[0]
    expected = Peer("peft", model, autocast=preset.autocast).gradient_norm(batch)
    factors = random_estimator(model).factors
    reference.apply(model, factors, [(0.0, 0.0)] * 2)
    assert Peer("reference", model, autocast=preset.autocast).gradient_norm(batch) == expected


def test_gradient_norm_leaves_the_model_as_it_was() -> None:
    model = dense(PRESETS["tiny"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, norm = Peer("peft", model).gradient_norm(PRESETS["tiny"].batches(1)[0])
    assert loss > 0 and norm > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_a_turn_waits_at_its_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    issued: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(issued)))
    peer = Peer("peft", dense(PRESETS["tiny"]))
    inner = peer.optimizer.step
    monkeypatch.setattr(peer.optimizer, "step", lambda: (inner(), issued.append(1)))
    peer.turn(PRESETS["tiny"].batches(3))
    assert waits == [0, 3]


def test_busy_time_counts_overlaps_once() -> None:
    assert measuring.covered([(0, 10), (5, 12), (20, 25), (21, 22)]) == 17


# ---------------------------------------------------------------- processes


def job(name: str, *lines: str) -> Job:
    """A process that says what it is told to, by a script in place of a model."""
    tell = f"tell = lambda **f: print({MARK!r} + json.dumps(f), flush=True)"
    code = ["import json, sys, time", tell, *lines]
    return Job(name, [sys.executable, "-c", "\n".join(code)])


def suite(path: Path, minutes: float, *jobs: Job) -> Suite:
    return Suite(argparse.Namespace(out=path, minutes=minutes, tiny=True), list(jobs))


CHECKED = (
    "tell(kind='check', what='sum', passed=True, error=0.0, bound=1.0, where='loss')",
    "tell(kind='done')",
)


def timing(name: str, log: Path, ratio: float) -> Job:
    row = {"peer": "ours", "ratio": ratio, "wall_ms": 2.0}
    return job(
        name, "tell(kind='ready', peers=['ours'])", "assert sys.stdin.readline() == 'go\\n'",
        f"open({str(log)!r}, 'a').write('begin ')", f"tell(kind='rows', rows=[{row!r}])",
        "time.sleep(0.2)", f"open({str(log)!r}, 'a').write('end ')", "tell(kind='done')",
    )  # fmt: skip


def test_presets_have_the_device_one_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "order"
    checks = job(CORRECTNESS, *CHECKED)
    made = suite(tmp_path, 1, checks, timing("a", log, 1.5), timing("b", log, 1.25))
    found = made.run()
    assert log.read_text().split() == ["begin", "end"] * 2
    assert found["correct"] is True
    assert [found["presets"][n]["rows"][0]["ratio"] for n in "ab"] == [1.5, 1.25]
    assert json.loads((tmp_path / "gpu_suite.json").read_text())["presets"] == found["presets"]
    assert "| ours | 1.5 |" in (tmp_path / "gpu_suite.md").read_text()


@pytest.mark.slow
def test_what_was_measured_is_kept_when_the_time_is_up(tmp_path: Path) -> None:
    endless = job("b", "tell(kind='peer', peer='ours', compile_s=1.0)", "time.sleep(600)")
    start = time.monotonic()
    made = suite(
        tmp_path, 0.1, job(CORRECTNESS, *CHECKED), timing("a", tmp_path / "o", 1.5), endless
    )
    found = made.run()
    assert time.monotonic() - start < 12
    assert endless.process is not None and endless.process.returncode == -9
    assert found["presets"]["b"]["state"] == "out of time while compiling"
    assert found["presets"]["a"]["state"] in ("done", "out of time while ready")
    assert "ours: not measured: no time" in (tmp_path / "gpu_suite.md").read_text()


def test_a_process_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    broken = job("a", "raise RuntimeError('no such thing')")
    found = suite(tmp_path, 1, broken, timing("b", tmp_path / "o", 1.5)).run()
    assert found["presets"]["a"]["state"] == "failed"
    assert "no such thing" in found["presets"]["a"]["tail"][-1]
    assert found["presets"]["b"]["rows"][0]["ratio"] == 1.5
    assert found["correct"] is False  # nothing was checked


def test_a_failed_check_makes_the_suite_fail(tmp_path: Path) -> None:
    wrong = CHECKED[0].replace("True", "False")
    assert suite(tmp_path, 1, job(CORRECTNESS, wrong, CHECKED[1])).run()["correct"] is False
    unfinished = job(CORRECTNESS, CHECKED[0], "raise SystemExit(1)")
    assert suite(tmp_path, 1, unfinished).run()["correct"] is False


def test_the_command_line_names_peers_for_every_preset() -> None:
    words = ["--out", "x", "--tiny", "--presets", "8b-csr", "--options", "ours", "ours+whole"]
    arguments = parsed(words)
    assert peers_of("8b-csr", arguments) == ["peft+compile", "ours", "ours+whole"]
    names = [made.name for made in jobs_of(arguments)]
    assert names == [CORRECTNESS, "8b-csr"]
    assert "ours+trim" in peers_of("8b-math10k", parsed(["--out", "x"]))


@pytest.mark.parametrize("name", ["peft", "ours+quick"])
def test_options_that_are_not_known_are_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(["--out", "x", "--options", name])
    assert "allowed: ours, with any of +trim" in capsys.readouterr().err


def test_without_a_gpu_only_toys_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="not measured"):
        gpu_suite.main(["--out", str(tmp_path)])


# ---------------------------------------------------------------- a preset


def told(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return [json.loads(line.removeprefix(MARK)) for line in lines]


@pytest.mark.slow
def test_a_preset_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = ["peft+compile", "ours+trim", "liger"]
    words = ["case", "8b-math10k", "--tiny", "--backend", "eager", "--seconds", "0.2"]
    monkeypatch.setattr(sys, "argv", [*words, "--peers", *peers])
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    suite_case.main()
    said = told(capsys.readouterr().out)
    assert [line["kind"] for line in said][:5] == ["preset", *["peer"] * 3, "ready"]
    assert said[-1]["kind"] == "done"
    rows = {row["peer"]: row for row in said[-2]["rows"]}
    assert list(rows) == peers and "NVIDIA" in rows["liger"]["not_measured"]
    for name in peers[:2]:
        row = rows[name]
        assert row["wall_ms"] > 0 and row["turns"] >= 3 and row["tokens_per_s"] > 0
        assert row["peak_gib"] > 0 and row["grad_norm"] > 0 and row["loss"] > 0
    assert rows["peft+compile"]["ratio"] == 1


@pytest.mark.slow
def test_the_check_sees_other_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It agrees where the channels agree, and would notice if they did not."""
    preset = replace(preset_of("8b-math10k", 2, tiny=True), dtype=torch.float32)
    error, _ = suite_correctness.difference(preset, "eager")
    assert error < 1e-5
    apply = suite_correctness.reference.apply

    def on_others(*args: Any, fixed: Any, **options: Any) -> Any:
        return apply(*args, **options)  # the predictor's own channels, pooled otherwise

    monkeypatch.setattr(suite_correctness.reference, "apply", on_others)
    error, _ = suite_correctness.difference(preset, "eager")
    assert error > 1e-3


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu(tmp_path: Path) -> None:
    words = ["--tiny", "--minutes", "6", "--backend", "eager", "--presets", "8b-math10k"]
    assert gpu_suite.main([*words, "--options", "ours", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert found["correct"] and len(found["checks"]) == len(suite_correctness.CHECKS)
    assert found["presets"]["8b-math10k"]["rows"][1]["ratio"] > 0
    assert found["versions"]["commit"]
