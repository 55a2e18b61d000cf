"""A watched model in a Trainer: its state is in the checkpoints, and the bill is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.resumed_training import trained, trainer_of

PLAN = {"layers.0.mlp": 0.6, "layers.0.self_attn": 0.5}


def compiled() -> nn.Module:
    """A watch that acts at once, so that levels move in six steps."""
    model = oracle.llama(dropout=0.1)
    plan = slx.SparsityPlan(PLAN, tokens="all", channel_multiple=1, start_step=1)
    watch = slx.Watch(every=1, tolerance=1e-7, mode="adapt", window=3)
    estimator = oracle.estimator_of(model)
    return slx.compile(model, estimator, plan=plan, backend="eager", watch=watch)


@pytest.mark.slow
def test_resume_is_bit_equal_and_levels_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # no noise is allowed for: every third probe trips
    for bound in ("SPREADS", "ERRORS"):
        monkeypatch.setattr(f"sparselora_fx.watch.judge.{bound}", 0.0)
    whole = compiled()
    trainer_of(whole, tmp_path).train()
    assert "cost: " in capsys.readouterr().out
    drift, weights = slx.drift(whole), trained(whole)
    assert any(level < PLAN[name.removeprefix("model.")] for name, level in drift.levels.items())
    assert [probe.step for probe in drift.probes] == [1, 2, 3, 4, 5]
    resumed = compiled()
    callback = slx.SparsityCallback(summary=False)
    trainer_of(resumed, tmp_path, callback).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert "cost: " not in capsys.readouterr().out
    got = trained(resumed)
    assert [n for n, value in weights.items() if not torch.equal(got[n], value)] == []
    assert slx.drift(resumed).to_json() == drift.to_json()
    assert slx.drift(resumed).levels == drift.levels
    # The comparison can tell: without the file the levels would have begun anew.
    saved = json.loads((tmp_path / "checkpoint-4" / "sparselora_watch.json").read_text())
    assert saved["ladder"]["lowered"] or any(r[1] for r in saved["ladder"]["regions"].values())


def test_a_file_that_is_no_state_is_a_typed_error(tmp_path: Path) -> None:
    model, file = compiled(), tmp_path / "watch.json"
    slx.save_watch(model, file)
    slx.load_watch(model, file)
    file.write_text('{"version": 9}')
    with pytest.raises(slx.WatchError, match="no state of a watch"):
        slx.load_watch(model, file)
    file.write_text("{")
    with pytest.raises(slx.WatchError, match="cannot read"):
        slx.load_watch(model, file)
    with pytest.raises(slx.WatchError, match="cannot write"):
        slx.save_watch(model, tmp_path / "none" / "watch.json")
