"""Passes are numbered, logged, checked, and left out by exact name."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import fx

import sparselora_fx as slx
from sparselora_fx import environment
from sparselora_fx.compiler import backend, spec
from sparselora_fx.compiler.cuda_graphs import cuda_graphs_of
from sparselora_fx.compiler.switches import switched_on
from sparselora_fx.environment import DISABLED_LAYERS, DISABLED_PASSES, LAYERS
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import (
    cache_key,
    constraints,
    gather_matmul,
    inductor_backend,
    install,
    triton,
)
from sparselora_fx.passes import NEEDED, ONLINE_CALIBRATION, PIPELINE, WHOLE_GRAPH
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support import oracle
from tests.support.rewritten_graphs import rewritten
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


@pytest.mark.slow
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
    lines = [line for r in caplog.records if " matched in " in (line := r.getMessage())]
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


@pytest.mark.slow
def test_layers_are_left_out_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = oracle.llama(layers=3), ragged()
    called: list[str] = []
    monkeypatch.setattr(
        backend, "compile_piecewise", lambda *args: called.append("pieces") or args[3](*args[:2])
    )
    whole = oracle.run_compiled(model, data, PLAN)
    assert called == ["pieces"] and cuda_graphs_of(model, True, backend="inductor", regional=False)
    key = cache_key.key()
    monkeypatch.setenv(DISABLED_LAYERS, ", ".join(LAYERS))
    oracle.assert_identical(oracle.run_compiled(model, data, PLAN), whole)
    assert called == ["pieces"] and cache_key.key() != key
    assert cuda_graphs_of(model, True, backend="inductor", regional=False) is None


def test_a_switched_off_template_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(iter(triton.FAMILIES.values()))
    monkeypatch.setattr(triton, "problem", lambda *_: None)
    monkeypatch.setattr(constraints, "ineligible", lambda _: None)
    monkeypatch.setattr(triton, "autotunes", lambda: True)
    monkeypatch.setattr(triton, "lower", lambda *_: "template")
    monkeypatch.setitem(gather_matmul.SLICED, family.op, lambda *_: "gather")
    lower = install._sliced(family)
    assert lower(None, None, None) == "template"
    monkeypatch.setenv(DISABLED_LAYERS, "templates")
    assert lower(None, None, None) == "gather"


def test_launches_are_shared_on_a_gpu_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = inductor_backend.settings_for("cuda")
    assert on_gpu["combo_kernels"] is True
    assert "combo_kernels" not in inductor_backend.settings_for("cpu")
    assert inductor_backend.settings_for("mps") == {}, "as torch has it, where nobody ran it"
    assert environment.shares_launches("cuda") and not environment.shares_launches("cpu")
    monkeypatch.setenv(DISABLED_LAYERS, "shared_launches")
    assert inductor_backend.settings_for("cuda") == {} and not environment.shares_launches("cuda")


def test_other_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLED_LAYERS, "piece")
    model = oracle.llama(layers=1)
    with pytest.raises(
        slx.CompileError, match="may go: pieces, cuda_graphs, templates, shared_launches"
    ):
        slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="eager")
