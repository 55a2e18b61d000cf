"""`graphs` shows what each pass does, on request the graphs themselves, and changes nothing."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import sparselora_fx as slx
from sparselora_fx.compiler.pass_log import PassRecord
from sparselora_fx.passes import PIPELINE, WHOLE_GRAPH
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def compiled(model: nn.Module, plan: Any = PLAN, **options: Any) -> nn.Module:
    options = {"backend": "aot_eager"} | options
    return slx.compile(model, oracle.estimator_of(model), plan=plan, **options)


def test_a_trace_shows_each_pass_and_the_modules() -> None:
    shown = slx.graphs(compiled(oracle.llama()), ragged())
    (one,) = shown.compilations
    assert one.kind == "sparse" and one.log.records[0].name == WHOLE_GRAPH[0].__name__
    assert [r.name for r in one.log.records[len(WHOLE_GRAPH) :]] == [p.__name__ for p in PIPELINE]
    before, after = shown.before(), shown.after()
    assert "sliced_linear" not in before and " = sliced_linear(" in after
    assert "layers.0.mlp" in before and "gate_proj" in before and "[112, 48]" in before
    assert shown.before("slice_sites") != shown.after("slice_sites")
    added = [line for line in shown.difference("slice_sites").splitlines() if line[0] == "+"]
    assert any("sliced_linear(" in line for line in added)
    text = str(shown)
    assert "slice_sites" in text and "sliced_linear: 0 -> " in text


@pytest.mark.slow
def test_the_differences_add_up_to_the_graph() -> None:
    hooked: list[Counter[str]] = []
    slx.graphs(
        compiled(oracle.llama()), ragged(), after_pass=lambda record, gm: hooked.append(
            Counter(node.op for node in gm.graph.nodes)
        ),
    )  # fmt: skip
    shown = slx.graphs(compiled(oracle.llama()), ragged())
    records = shown.compilations[0].log.records
    for earlier, later in itertools.pairwise(records):
        assert earlier.after == later.before
    assert len(hooked) == len(records)
    assert sum(records[-1].after.values()) == sum(hooked[-1].values())


@pytest.mark.slow
def test_a_trace_changes_nothing() -> None:
    """Neither the model's marks, nor random numbers, nor what the next steps compute and compile:
    fixed sizes stay fixed."""
    plain, data = compiled(oracle.llama()), ragged()
    steps = [oracle.step(plain, data) for _ in range(2)]
    graphs = get_runtime(plain).graphs
    torch.compiler.reset()
    model = compiled(oracle.llama())
    shorter = {key: value[:, :-2] for key, value in data.items()}
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    state = torch.get_rng_state()
    slx.graphs(model, shorter)
    assert torch.equal(torch.get_rng_state(), state)
    oracle.assert_untouched(model, before, weights)
    runtime = get_runtime(model)
    assert (runtime.graphs, runtime.calls, runtime.tally.calls) == (0, 0, 0)
    assert not runtime.seen and not runtime.stepped
    for expected in steps:
        oracle.assert_identical(oracle.step(model, data), expected)
    assert runtime.graphs == graphs
    assert not runtime.recompiles.again and "s" not in runtime.compilations[0].batch


def test_compiled_graphs_have_their_counts() -> None:
    model, data = compiled(tiny()), ragged()
    assert "no graph was compiled yet" in str(slx.graphs(model))
    oracle.step(model, data)
    shown = slx.graphs(model)
    assert len(shown.compilations) == 1 and shown.compilations[0].seconds > 0
    assert "sliced_linear: 0 -> " in str(shown) and "batch 3 x " in str(shown)
    with pytest.raises(slx.CompileError, match="trace a batch"):
        shown.after()


def test_what_is_not_there_is_refused() -> None:
    shown = slx.graphs(compiled(tiny()), ragged())
    with pytest.raises(slx.CompileError, match=r"those that did: .*find_unread_padding"):
        shown.before("slice")
    with pytest.raises(slx.CompileError, match=r"graphs that passes saw: \[1\]"):
        shown.before(graph=2)
    with pytest.raises(slx.CompileError, match="parts of graph 1"):
        shown.before(part="x")


def test_a_hook_sees_each_pass_and_may_change_the_graph() -> None:
    """Here it makes the model's loss three times as large, behind all passes."""
    seen: list[str] = []

    def hook(record: PassRecord, gm: fx.GraphModule) -> None:
        seen.append(record.name)
        if record.number == record.total:
            output = gm.graph.output_node()
            loss = output.args[0][0]
            with gm.graph.inserting_before(output):
                larger = gm.graph.call_function(torch.mul, (loss, 3.0))
            larger.meta.update(loss.meta)
            output.args = ((larger, *output.args[0][1:]),)

    model, data = tiny(), ragged()
    plain = oracle.run_compiled(model, data, PLAN)
    compiled(model)
    slx.graphs(model, after_pass=hook)
    changed = oracle.step(model, data)
    assert seen == [step.__name__ for step in (*WHOLE_GRAPH, *PIPELINE)]
    torch.testing.assert_close(changed.loss, 3 * plain.loss)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(changed.gradients[name], 3 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checkpointed_bodies_are_shown() -> None:
    model = oracle.llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shown = slx.graphs(compiled(model), ragged())
    bodies = [(one.number, part) for one in shown.compilations for part in one.log.start if part]
    texts = [shown.after(graph=number, part=part) for number, part in bodies]
    assert any("sliced_linear(" in text for text in texts)
    assert any(f"slice_sites in {part}:" in str(shown) for _, part in bodies)


def test_alike_blocks_that_are_compiled_one_by_one_are_one_graph() -> None:
    blocks = slx.graphs(compiled(oracle.llama(layers=3), regional=True), ragged())
    assert len(blocks.compilations) == 1


def test_artifacts_land_in_torchs_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._logging import _internal

    file = tmp_path / "trace.log"
    handler = logging.FileHandler(file)
    handler.setFormatter(_internal.TorchLogsFormatter(trace=True))
    _internal.trace_log.addHandler(handler)
    try:
        oracle.step(compiled(tiny(), backend="eager"), ragged())
    finally:
        _internal.trace_log.removeHandler(handler)
        handler.close()
    text = file.read_text(encoding="utf-8")
    assert '"name": "sparselora_fx.0.traced"' in text
    assert "slice_sites" in text and "= sliced_linear(" in text


@pytest.mark.slow
def test_info_speaks_to_users(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(oracle.llama(), backend="eager")
    with caplog.at_level(logging.INFO, "sparselora_fx"):
        oracle.step(model, ragged())
        oracle.step(model, {key: value[:2, :-1] for key, value in ragged().items()})
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0].startswith("compiling: graph 1 (sparse), batch 3 x ")
    assert any("about " in line for line in lines)
    assert all(line.startswith(("compiling: ", "compiled: ")) for line in lines), lines
