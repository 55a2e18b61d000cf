"""Passes are numbered, logged, checked, and left out by exact name."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import fx

import sparselora_fx as slx
from sparselora_fx.compiler import spec
from sparselora_fx.compiler.switches import switched_on
from sparselora_fx.environment import DISABLED_PASSES
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes import NEEDED, ONLINE_CALIBRATION, PIPELINE, WHOLE_GRAPH
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support import oracle
from tests.support.rewritten_graphs import rewritten
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def test_a_pass_is_left_out_and_the_numbers_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = oracle.llama(layers=1, dtype=torch.float64)
    whole = oracle.run_compiled(model, ragged(), PLAN)
    monkeypatch.setenv(DISABLED_PASSES, "hoist_channel_gathers, skip_zeros")
    oracle.assert_close(oracle.run_compiled(model, ragged(), PLAN), whole, 2e-6)
    with caplog.at_level(logging.DEBUG, "sparselora_fx.compiler.pipeline"):
        _, report = rewritten(monkeypatch, model, ragged(), PLAN)
    assert not {"hoist_channel_gathers", "skip_zeros"} & report.counts.keys()
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    total = len(WHOLE_GRAPH) + len(PIPELINE) - 2
    shown = [re.match(r"(\d+)/(\d+) (\w+): \d+ matched in [\d.]+ ms", line) for line in lines]
    assert [m and (int(m[1]), int(m[2])) for m in shown] == [(n + 1, total) for n in range(total)]
    assert any("linear: " in r.getMessage() and "->" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("hoist", "passes that may go"),
        ("find_sites", "cannot be left out"),
        ("skip_zero", "may go"),
    ],
)
def test_other_names_are_refused(monkeypatch: pytest.MonkeyPatch, names: str, says: str) -> None:
    monkeypatch.setenv(DISABLED_PASSES, f"skip_zeros,{names}")
    model = oracle.llama(layers=1)
    with pytest.raises(slx.CompileError, match=says):
        slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="eager")
    assert "forward" not in model.__dict__


def test_what_is_needed_has_a_name() -> None:
    names = {step.__name__ for step in (*WHOLE_GRAPH, *PIPELINE, *ONLINE_CALIBRATION)}
    assert NEEDED.keys() <= names


def test_nothing_is_left_out_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DISABLED_PASSES, raising=False)
    assert switched_on(PIPELINE) == PIPELINE


def test_a_marker_that_is_left_is_seen() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((graph.call_function(OPS.site.default, (x, w, w, w, [], "0.5,0.5", [])),))
    rewrite = Rewrite(fx.GraphModule(torch.nn.Module(), graph), Options())
    spec.check(rewrite, "canonicalize")
    rewrite.counts["find_sites"] = 1
    with pytest.raises(AssertionError, match="after find_sites: the markers"):
        spec.check(rewrite, "find_sites")
