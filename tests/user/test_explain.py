"""`explain` in its folded form: ranges of plan keys, reasons, a verdict; before any step and after
one, for people, programs and notebooks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.compiler.pass_log import PassLog
from sparselora_fx.compiler.report import Compilation
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.runtime import step_cost
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.speed_check import Verdict
from sparselora_fx.user.folding import PlanKeys, covering, fold, ranges
from tests.support import oracle
from tests.support.slow import slow
from tests.support.tiny_models import tiny
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan("default", start_step=0)


def compiled(model: nn.Module, plan: Any = PLAN, **options: Any) -> nn.Module:
    options = {"backend": "eager"} | options
    return slx.compile(model, oracle.estimator_of(model), plan=plan, **options)


LINEARS = "rows of gate_proj, up_proj; columns of down_proj"
NOT_SPARSE = "dense: the plan keeps it dense (sparsity 0)"
DENSE = {
    NOT_SPARSE: (("layers.0,3",), 14),
    "dense: k rounds up to all of its channels": (("layers.1-2.self_attn",), 8),
}


@pytest.mark.parametrize(
    ("build", "linears", "count", "dense"),
    [
        slow(oracle.llama, LINEARS, 28, DENSE),
        (
            lambda layers: tiny(layers, channels=112),
            LINEARS.replace("_proj", ".base"),
            12,
            {NOT_SPARSE: (("layers.0,3",), 6)},
        ),
    ],
    ids=["llama", "feed-forwards"],
)
def test_alike_layers_are_one_row_before_a_step_and_after(
    build: Any, linears: str, count: int, dense: Any
) -> None:
    """The default plan on four layers: the middle two are sparse. A trace and a step agree."""
    model, data = compiled(build(layers=4)), ragged()
    before = slx.explain(model, data)
    assert get_runtime(model).graphs == 0 and "none of them run" in before
    oracle.step(model, data)
    after = slx.explain(model)
    for said in (before, after):
        assert max(map(len, said.splitlines())) <= 100
        (row,) = said.regions
        assert row.names == ("layers.1-2.mlp",) and (row.kind, row.kept) == ("ffn", "32 of 112")
        assert row.linears == linears
        assert f"6 of {count} frozen linears rewritten" in said
        reasons = {group.note: (group.names, group.count) for group in said.dense}
        assert reasons == dense
        sparse, real = (data["labels"] == -100).sum(), data["attention_mask"].sum()
        assert 0 < said.worth["sparse_tokens"] < 1 and int(sparse) and int(real)
    assert before.worth["sparse_tokens"] == after.worth["sparse_tokens"]
    assert [vars(row) for row in before.rows] == [vars(row) for row in after.rows]
    assert before.worth["compile_seconds"] is None and after.worth["compile_seconds"] > 0


def test_names_are_keys_of_a_plan() -> None:
    """Each name that a range stands for is a key that covers exactly its region's linears."""
    model = oracle.llama(layers=3)
    frozen = frozen_weights(model)
    keys = PlanKeys([w.name for w in frozen])
    modules = [name for name, _ in model.named_modules()]
    for module in ("layers.1.mlp", "layers.2.self_attn"):
        key = keys.key(f"base_model.model.model.{module}")
        assert key == module
        hit = slx.SparsityPlan({key: 0.5}).resolve(frozen, modules)
        assert {n for n, s in hit.items() if s.ffn} == {w.name for w in frozen if module in w.name}
    two = PlanKeys(["encoder.layers.0.up", "decoder.layers.0.up", "head"])
    assert two.key("encoder.layers.0.up") == "encoder.layers.0.up" and two.key("head") == "head"


def test_folding() -> None:
    assert ranges(["3", "0", "1", "7"]) == "0-1,3,7"
    names = [f"layers.{i}.experts.{j}" for i in (0, 1, 4) for j in range(3)] + ["head"]
    assert fold(names) == ["layers.0-1,4.experts.0-2", "head"]
    uneven = ["layers.0.experts.0", "layers.1.experts.0", "layers.1.experts.1"]
    assert fold(uneven) == ["layers.0.experts.0", "layers.1.experts.0-1"]
    everything = ["m.layers.0.a.x", "m.layers.0.a.y", "m.layers.0.b", "m.layers.1.b", "head"]
    assert covering(everything[:3], everything) == ["m.layers.0"]
    assert covering([*everything[:2], "head"], everything) == ["m.layers.0.a", "head"]


def test_verbose_has_a_line_for_each_linear() -> None:
    model = compiled(tiny(2), 0.5)
    said = slx.explain(model, ragged(), verbose=True)
    names = {line.split()[0] for line in said.splitlines()}
    assert {w.name for w in frozen_weights(model)} <= names


@pytest.mark.slow
def test_programs_and_notebooks() -> None:
    model = compiled(oracle.llama(layers=4))
    said = slx.explain(model, ragged())
    data = json.loads(said.to_json())
    assert len(data["linears"]) == 28 and sum(row["sliced"] for row in data["linears"]) == 6
    assert data["regions"][0]["names"] == ["layers.1-2.mlp"]
    assert data["worth"]["verdict"].startswith("Does it pay?")
    page = said._repr_html_()
    assert page.count("<table>") == 3 and "<td>layers.1-2.mlp</td>" in page
    assert "layers.1-2.mlp" in str(said) and said == str(said)


@pytest.mark.parametrize(
    ("plan", "data", "says"),
    [
        (slx.SparsityPlan(0.0), ragged(), "No: nothing is sliced"),
        (slx.SparsityPlan(0.5, start_step=0), None, "Not known before a training step"),
        (slx.SparsityPlan(0.9, start_step=0), ragged(), "x, not measured yet: 34% of the tokens"),
        (slx.SparsityPlan(0.5, min_sparse=0.9), ragged(), "No: hardly a token is sparse"),
    ],
)
def test_the_verdict_is_plain(
    plan: slx.SparsityPlan, data: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that was not measured: predictions are FLOPs."""
    monkeypatch.setattr(step_cost, "rates_of", lambda *_: None)
    model = compiled(tiny(hidden=48, channels=112), plan, shift=True)
    with pytest.warns(UserWarning) if plan.min_sparse > 0.5 else torch.no_grad():
        said = slx.explain(model, data)
    assert says in said.worth["verdict"] and says in " ".join(said.split())
    assert ("the plan's min_sparse" in " ".join(said.split())) == (plan.min_sparse > 0.5)


def test_what_was_measured_is_the_verdict() -> None:
    """A ratio measured at the switch goes before what is predicted; 7 s of compiling sparse graphs
    and 1 s of the estimator are gained back in 800 steps of 10 ms less."""
    runtime = get_runtime(model := compiled(oracle.llama()))
    runtime.compilations.append(Compilation(1, "dense", "2 x 9", 60, PassLog(), 100.0))
    runtime.compilations.append(Compilation(2, "sparse", "2 x 9", 90, PassLog(), 7.0))
    runtime.estimator_seconds = 1.0
    runtime.speed.verdict = Verdict(0.5, 3, 10.0, 20.0, "a card")
    worth = slx.explain(model).worth
    assert (worth["measured_ratio"], worth["break_even_step"]) == (2.0, 800)
    assert worth["verdict"].startswith("Does it pay? Yes: a sparse step takes 0.50 of a dense one")
    runtime.speed.verdict = Verdict(1.5, 3, 30.0, 20.0, "a card")
    worth = slx.explain(model).worth
    assert worth["verdict"].startswith("Does it pay? No: a sparse step takes 1.50 of a dense one")
    assert worth["break_even_step"] is None


def test_a_step_of_little_work_is_not_predicted_to_pay() -> None:
    """On a CPU a sparse step calls more ops, and each of them takes its time."""
    worth = slx.explain(compiled(tiny(hidden=48, channels=112), 0.9), ragged()).worth
    assert worth["sparse_flops"] < worth["dense_flops"] and worth["predicted_ratio"] < 1
    assert "No: a sparse step would take 1." in worth["verdict"]


def test_what_is_predicted_before_a_step_and_what_is_not_known_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_cost, "rates_of", lambda *_: None)
    model, data = compiled(tiny(3, hidden=48, channels=112)), ragged()
    explained = slx.explain(model, data)
    worth = explained.worth
    assert json.loads(explained.to_json())["worth"] == worth and get_runtime(model).graphs == 0
    assert worth["predicted_ratio"] == worth["dense_flops"] / worth["sparse_flops"] > 1
    assert 0 < worth["choosing_flops"] < worth["sparse_flops"] and worth["estimator_seconds"] > 0
    unknown = ("measured_ratio", "compile_seconds", "break_even_step")
    assert [worth[name] for name in unknown] == [None] * 3
    said, page = str(explained), explained._repr_html_()
    for text in ("not measured yet", "not compiled yet", f"{worth['predicted_ratio']:.2f}x"):
        assert text in said and text in page
    assert "pass a batch to count FLOPs" in slx.explain(model)


def test_a_schedule_that_is_dense_now_does_not_hide_what_is_to_come() -> None:
    model = compiled(tiny(), slx.SparsityPlan(0.5, start_step=3, channel_multiple=1))
    slx.step(model, 0, 10)
    oracle.step(model, ragged())
    assert "the schedule was dense" in slx.explain(model)
    assert "3 of 3 frozen linears rewritten" in slx.explain(model, ragged())
    assert "the schedule was dense" in slx.explain(model)


@pytest.mark.slow
def test_with_a_batch_of_blocks_and_of_checkpointing() -> None:
    model = oracle.llama(layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = oracle.plan_of(0.5)
    for options in ({}, {"regional": True}):
        compiled(model, plan, **options)
        assert "21 of 21 frozen linears rewritten" in slx.explain(model, oracle.batch())
        oracle.step(model, oracle.batch())
        assert "21 of 21 frozen linears rewritten" in slx.explain(model)
        torch.compiler.reset()
