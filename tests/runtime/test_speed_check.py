"""A few steps tell whether sparse ones are faster; if not, training stays dense and says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.speed_check import DENSE_STEPS, FEW, MOST, Verdict
from sparselora_fx.runtime.timer import Timer
from tests.support import oracle
from tests.support.tiny_models import tiny
from tests.support.trainers import _trainer

START = 2


class Scripted(Timer):
    """A clock that the test puts forward."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at


def compiled(
    verify_speed: bool | None = True, start: int = START, model: nn.Module | None = None
) -> nn.Module:
    plan = slx.SparsityPlan(
        {"layers.0.mlp": 0.5}, tokens="all", start_step=start, channel_multiple=1
    )
    model = tiny() if model is None else model
    return slx.compile(
        model, oracle.estimator_of(model), plan=plan, backend="eager", verify_speed=verify_speed
    )


Cost = Callable[[int, bool], float]  # seconds of a step, by its number and whether it is dense


def train(
    model: nn.Module, cost: Cost, steps: int = 20, calls: int = 1, driven: bool = True
) -> list[bool]:
    """Steps of ``calls`` calls each; whether they ran dense. The first of each kind compiles, and
    takes a hundred times as long."""
    runtime, clock, dense = get_runtime(model), Scripted(), []
    runtime.speed.timer = clock
    for number in range(steps):
        if driven:
            slx.step(model, number, steps)
        kinds = []
        for call in range(calls):
            before = runtime.graphs
            loss = model(**oracle.batch(2, 12, seed=number * calls + call)).loss
            kinds.append(runtime.specs_set is None or runtime.specs_set[0] == 0)
            slow = 100 if runtime.graphs > before else 1
            clock.at += slow * cost(number, kinds[-1])
            loss.backward()
            clock.at += 7.0  # outside of steps: optimizer, data, evaluation
        assert len(set(kinds)) == 1, "calls of one step run alike"
        dense.append(kinds[0])
    return dense


def slower(number: int, dense: bool) -> float:
    return 0.010 if dense else 0.013


def faster(number: int, dense: bool) -> float:
    return 0.010 if dense else 0.007


@pytest.mark.parametrize("calls", [1, 2], ids=["", "accumulated"])
def test_slower_sparse_steps_leave_training_dense_with_one_warning(calls: int) -> None:
    model = compiled()
    with pytest.warns(UserWarning, match="sparse steps are not faster here") as said:
        dense = train(model, slower, calls=calls)
    text = [str(w.message) for w in said if "not faster" in str(w.message)]
    assert len(text) == 1
    assert f"1.30 of a dense one ({13 * calls} ms against {10 * calls} ms" in text[0]
    assert "verify_speed=False" in text[0] and f"{FEW} pairs" in text[0]
    assert all(dense[12:]) and dense[START:].count(False) <= 2 + FEW
    assert "training stays dense" in slx.explain(model, verbose=True)


@pytest.mark.parametrize("calls", [1, 2], ids=["", "accumulated"])
def test_faster_sparse_steps_stay_at_the_cost_of_three_dense_ones(calls: int) -> None:
    model = compiled()
    dense = train(model, faster, calls=calls)
    assert dense[:START] == [True] * START
    # The first compiles, the second shows that nothing more is compiled; then pairs follow.
    assert dense[START:] == [False, False, True, False, False, True, True] + [False] * 11
    verdict = get_runtime(model).speed.verdict
    assert verdict is not None and verdict.ratio == pytest.approx(0.7) and verdict.pairs == FEW
    assert "a sparse step takes 0.70 of a dense one" in slx.explain(model, verbose=True)


def test_pairs_that_disagree_are_outvoted() -> None:
    """Every fifth step is disturbed, whatever its kind."""

    def disturbed(number: int, dense: bool) -> float:
        return faster(number, dense) + (0.050 if number % 5 == 1 else 0.0)

    model = compiled()
    dense = train(model, disturbed, steps=30)
    verdict = get_runtime(model).speed.verdict
    assert verdict is not None and verdict.pays and verdict.pairs == MOST
    assert dense[START:].count(True) == MOST


def test_without_a_dense_phase_the_first_dense_step_compiles_and_does_not_count() -> None:
    model = compiled(start=0)
    dense = train(model, faster, driven=False)
    assert dense == [False, False, True, True, True] + [False, False, True, True] + [False] * 11
    verdict = get_runtime(model).speed.verdict
    assert verdict is not None and verdict.ratio == pytest.approx(0.7)


def test_dense_steps_end_where_nothing_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    runtime = get_runtime(model)
    train(model, faster, steps=START + 2)
    work = iter(range(1000, 2000))
    monkeypatch.setattr(runtime.speed, "counters", lambda: (next(work), 0))  # compiles each time
    dense = train(model, faster, steps=50)
    assert dense.count(True) == START + DENSE_STEPS and not any(dense[-30:])
    assert runtime.speed.verdict is None


@pytest.mark.parametrize("wanted", [False, None])
def test_other_backends_and_false_measure_nothing(wanted: bool | None) -> None:
    model = compiled(wanted)
    dense = train(model, slower)
    assert dense == [True] * START + [False] * (20 - START)
    assert "speed:" not in slx.explain(model, verbose=True)


def test_a_word_that_is_not_known_is_refused() -> None:
    with pytest.raises(slx.CompileError, match="verify_speed must be"):
        compiled("always")  # type: ignore[arg-type]


def test_steps_that_are_compared_compute_what_dense_ones_do() -> None:
    data = oracle.batch(2, 12)
    expected = oracle.step(tiny(), data)
    model = compiled()
    steps = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not faster.*")
        for number in range(8):
            slx.step(model, number, 8)
            steps.append(oracle.step(model, data))
    equal = [torch.equal(step.loss, expected.loss) for step in steps]
    # Steps 4 and 7 are the dense ones of pairs (dense, sparse), (sparse, dense).
    assert equal[:8] == [True, True, False, False, True, False, False, True]
    oracle.assert_identical(steps[4], expected)


def test_the_clock_of_a_cpu_times_forward_and_backward() -> None:
    model = compiled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not faster.*")
        for number in range(24):
            slx.step(model, number, 24)
            oracle.step(model, oracle.batch(2, 12, seed=number))
    verdict = get_runtime(model).speed.verdict
    assert verdict is not None and verdict.device == "cpu"
    assert 0 < verdict.sparse_ms < 10_000 and 0 < verdict.dense_ms < 10_000


def test_a_damaged_verdict_is_measured_again(tmp_path: Path) -> None:
    speed = get_runtime(compiled()).speed
    (tmp_path / "file").write_text('{"ratio": 0.5', encoding="utf-8")
    with pytest.warns(UserWarning, match="is damaged"):
        speed.load(tmp_path / "file", torch.device("cpu"))
    assert speed.verdict is None and not speed.over


def test_a_verdict_of_another_device_is_not_taken_over(tmp_path: Path) -> None:
    speed = get_runtime(compiled()).speed
    speed.verdict = Verdict(0.5, 3, 1.0, 2.0, "NVIDIA H200")
    speed.save(tmp_path / "file")
    again = get_runtime(compiled()).speed
    again.load(tmp_path / "file", torch.zeros(1))
    assert again.verdict is None and not again.over


@pytest.mark.slow
def test_a_verdict_is_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    model = compiled(start=1, model=oracle.llama())
    first = _trainer(model, tmp_path, steps=18)
    speed: Any = get_runtime(model).speed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not faster.*")
        first.train()
        assert speed.verdict is not None
        again = compiled(start=1, model=oracle.llama())
        _trainer(again, tmp_path, steps=20).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-18")
        )
    runtime = get_runtime(again)
    assert runtime.speed.verdict == speed.verdict and runtime.speed.dense_steps == 0
