"""Calibration from the dense phase survives checkpoints: in files, and in a Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparselora_fx as slx
from sparselora_fx.estimator.online import Collector
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.resumed_training import trained, trainer_of
from tests.support.slow import slow
from tests.support.tiny_models import tiny

PLAN = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}
FILE = "sparselora_estimator.safetensors"


def compiled(
    start: int = 4, *, rank: int = 4, seed: int = 0, small: bool = False, **options: Any
) -> nn.Module:
    """A Llama, or, where the files alone matter, a model that is quicker to compile."""
    keys = {"layers.0.mlp": 0.5} if small else PLAN
    plan = slx.SparsityPlan(
        keys, tokens="all", channel_multiple=1, rank=rank, start_step=start, calibrate="dense_phase"
    )
    model = tiny(dropout=0.1) if small else oracle.llama(dropout=0.1, seed=seed)
    return slx.compile(model, plan=plan, backend="eager", **options)


def collector_of(model: nn.Module) -> Collector:
    found = get_runtime(model).collector
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of six steps, sparse from the fourth on, with a checkpoint after each; and the
    adapters at its end."""
    folder = tmp_path_factory.mktemp("whole")
    model = compiled(3)
    trainer_of(model, folder).train()
    assert collector_of(model).calls == 6 and collector_of(model).estimator is not None
    return folder, trained(model)


@pytest.mark.parametrize("at", [slow(1), slow(3), 5], ids=["dense", "at the switch", "sparse"])
def test_resume_is_bit_equal(whole: Any, at: int) -> None:
    folder, expected = whole
    model = compiled(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dense.phase.*")
        trainer_of(model, folder).train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    got = trained(model)
    assert [n for n, value in expected.items() if not torch.equal(got[n], value)] == []
    # The comparison can tell: predicting from plain factors trains other adapters.
    collector = collector_of(model)
    assert collector.estimator is not None and collector.estimator.calibrated


@pytest.mark.slow
def test_a_resume_without_the_file_warns_and_uses_plain_factors(whole: Any, tmp_path: Path) -> None:
    folder, expected = whole
    model = compiled(3)
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=f"no {FILE}"):
        trainer_of(model, tmp_path / "out").train(
            resume_from_checkpoint=str(folder / "checkpoint-4")
        )
    estimator = collector_of(model).estimator
    assert estimator is not None and not estimator.calibrated
    got = trained(model)
    assert any(not torch.equal(got[n], value) for n, value in expected.items())


@pytest.mark.slow
def test_the_checkpoint_to_resume_from_may_be_elsewhere(whole: Any, tmp_path: Path) -> None:
    folder, expected = whole
    model, source = compiled(3), folder / "checkpoint-4"
    trainer = trainer_of(model, tmp_path, slx.SparsityCallback(resume_from=source))
    trainer.train(resume_from_checkpoint=str(source))
    got = trained(model)
    assert all(torch.equal(got[n], value) for n, value in expected.items())


def test_the_file_is_an_estimator_after_the_switch(whole: Any) -> None:
    folder, _ = whole
    estimator = slx.SVDEstimator.load(folder / "checkpoint-5" / FILE)
    assert estimator.calibrated and len(estimator.factors) == 7
    model = oracle.llama()
    plan = slx.SparsityPlan(PLAN, tokens="all", channel_multiple=1, start_step=0)
    slx.compile(model, estimator, plan=plan, backend="eager")
    with slx.record(model) as record:
        oracle.step(model, oracle.batch())
    oracle.assert_rewrote(record, model, PLAN)
    with pytest.raises(slx.EstimatorError, match="is no estimator file"):
        slx.SVDEstimator.load(folder / "checkpoint-1" / FILE)


def observed(start: int = 4, *, small: bool = False) -> nn.Module:
    model = compiled(start, small=small)
    slx.step(model, 0)
    oracle.step(model, oracle.batch())
    return model


def test_moments_round_trip(tmp_path: Path) -> None:
    model, other = observed(small=True), compiled(small=True)
    slx.save_calibration(model, tmp_path / "m")
    slx.load_calibration(other, tmp_path / "m")
    one, two = collector_of(model), collector_of(other)
    assert two.calls == one.calls == 1 and two.readers == one.readers and len(one.moments) == 2
    for key, moment in one.moments.items():
        same = two.moments[key]
        assert same.count == moment.count and same.full == moment.full
        for part in ("norms", "share", "shift", "total", "second"):
            assert torch.equal(getattr(same, part), getattr(moment, part)), (key, part)


def test_a_file_before_the_first_call_is_empty(tmp_path: Path) -> None:
    slx.save_calibration(compiled(small=True), tmp_path / "m")
    model = observed(small=True)
    slx.load_calibration(model, tmp_path / "m")
    assert collector_of(model).calls == 0 and not collector_of(model).moments


@pytest.mark.slow
def test_a_loaded_estimator_is_in_the_factors_at_once(tmp_path: Path) -> None:
    model = observed(start=1)
    slx.step(model, 1)
    oracle.step(model, oracle.batch())
    slx.save_calibration(model, tmp_path / "e")
    other = compiled(start=1)
    slx.load_calibration(other, tmp_path / "e")
    pairs = zip(model.named_modules(), other.named_modules(), strict=True)
    buffers = [(a._buffers, b._buffers, n) for (n, a), (_, b) in pairs]
    names = [(n, key) for a, _, n in buffers for key in a if key.startswith("_sparselora")]
    assert len(names) > 14
    assert all(torch.equal(a[k], b[k]) for a, b, _ in buffers for k in a if "_sparselora" in k)


@pytest.mark.slow
def test_bad_files_are_refused(tmp_path: Path) -> None:
    model = observed()
    slx.save_calibration(model, tmp_path / "m")
    with pytest.raises(slx.EstimatorError, match="does not belong to this model"):
        slx.load_calibration(compiled(seed=1), tmp_path / "m")
    with pytest.raises(slx.EstimatorError, match="cannot read"):
        slx.load_calibration(model, tmp_path / "none")
    slx.step(model, 4)
    oracle.step(model, oracle.batch())
    slx.save_calibration(model, tmp_path / "e")
    with pytest.raises(slx.EstimatorError, match=r"rank 4.*plan 3"):
        slx.load_calibration(compiled(rank=3), tmp_path / "e")
    plain = oracle.llama()
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.save_calibration(plain, tmp_path / "x")
    slx.compile(plain, oracle.estimator_of(plain), plan=oracle.plan_of(0.5), backend="eager")
    with pytest.raises(slx.CompileError, match="does not calibrate"):
        slx.load_calibration(plain, tmp_path / "m")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = observed(small=True)
    slx.save_calibration(model, tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "m")
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, tmp_path / "m", metadata=metadata)
    before = dict(collector_of(model).moments)
    with pytest.raises(slx.EstimatorError, match="is damaged"):
        slx.load_calibration(model, tmp_path / "m")
    assert collector_of(model).moments == before
