"""Calibration from the dense phase: what is observed, what is built from it, and when."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.estimator.statistics import DAMPING, Moment, aware_factors
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.bert import bert
from tests.support.online_calibration import (
    KEYS,
    as_lists,
    assert_same,
    batches,
    channels,
    collector_of,
    offline,
    plan_of,
)
from tests.support.slow import slow
from tests.support.tiny_models import tiny

SITE = "model.layers.0."


def compiled(model: nn.Module, plan: slx.SparsityPlan | None = None, **options: Any) -> nn.Module:
    options = {"backend": "eager", **options}
    return slx.compile(model, plan=plan or plan_of(), **options)


def of_ffn(plan: slx.SparsityPlan) -> slx.SparsityPlan:
    """A plan for a model that has no attention."""
    return replace(plan, sparsity={"layers.0.mlp": 0.5})


def run_dense_phase(model: nn.Module, data: list[dict[str, Any]]) -> None:
    for n, one in enumerate(data):
        slx.step(model, n)
        oracle.step(model, one)


def moments_of(model: nn.Module) -> dict[str, Moment]:
    return {key: copy.copy(moment) for key, moment in collector_of(model).moments.items()}


def tokens_seen(model: nn.Module) -> set[int]:
    """How many tokens each input was seen at; one number if all are alike."""
    return {moment.count for moment in collector_of(model).moments.values()}


@pytest.mark.parametrize(
    ("regional", "backend"),
    [(False, "eager"), slow(False, "aot_eager"), slow(True, "aot_eager")],
    ids=["whole", "whole-aot", "regional"],
)
def test_statistics_and_factors_are_those_of_an_offline_calibration(
    regional: bool, backend: str
) -> None:
    model = oracle.llama(bias=True, dtype=torch.float64)
    expected = offline(model, batches())
    compiled(model, regional=regional, backend=backend)
    run_dense_phase(model, batches())
    collector = collector_of(model)
    assert collector.calls == 3 and list(collector.readers.values()) == [
        [f"{SITE}self_attn.{w}_proj" for w in "qkv"],
        [f"{SITE}self_attn.o_proj"],
        [f"{SITE}mlp.gate_proj", f"{SITE}mlp.up_proj"],
        [f"{SITE}mlp.down_proj"],
    ]
    assert_same(collector.build(), expected)


@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager"])
def test_the_dense_phase_is_plain_compile_bit_for_bit(backend: str) -> None:
    model, data = oracle.llama(dropout=0.1), batches(1)[0]
    plain = oracle.plain_compiled_step(model, data, backend)
    compiled(model, backend=backend)
    slx.step(model, 0)
    oracle.assert_identical(oracle.step(model, data), plain)
    assert collector_of(model).calls == 1 and len(collector_of(model).moments) == 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_dense_phase_is_plain_inductor_bit_for_bit(checkpointing: bool) -> None:
    model, data = oracle.llama(layers=2), batches(1)[0]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = oracle.plain_compiled_step(model, data, "inductor")
    compiled(model, backend="inductor")
    slx.step(model, 0)
    oracle.assert_identical(oracle.step(model, data), plain)
    assert tokens_seen(model) == {int(data["attention_mask"].sum())}


@pytest.mark.slow
def test_sliced_equals_masked_dense_after_the_switch() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches()
    expected = offline(model, data)
    compiled(model, backend="aot_eager")
    run_dense_phase(model, data)
    slx.step(model, 3)
    with slx.record(model) as record:
        done = oracle.step(model, data[0])
    slx.restore(model)
    oracle.assert_rewrote(record, model, KEYS)
    oracle.assert_close(done, oracle.reference_step(model, data[0], record), 1e-9)
    assert channels(model, expected, data[0]) == as_lists(record)
    plain = slx.SVDEstimator.build(model, rank=4, progress=False)
    assert channels(model, plain, data[0]) != as_lists(record)


def test_an_attention_whose_way_back_lies_elsewhere_is_sliced() -> None:
    """BERT's query, key and value are square and alike, and none of them maps back."""
    model = bert(layers=1, hidden=48, wide=112, heads=6)
    options: dict[str, Any] = {"tokens": "all", "channel_multiple": 1, "rank": 4}
    plan = slx.SparsityPlan(0.5, start_step=1, calibrate="dense_phase", **options)
    slx.compile(model, plan=plan, backend="eager")
    data = batches(1)[0]
    for n in range(2):
        slx.step(model, n)
        with slx.record(model) as record:
            got = oracle.step(model, data)
    slx.restore(model)
    sliced = {name.split(".layer.0.")[1] for name in record.sites if "attention" in name}
    heads = {f"attention.self.{name}.base_layer" for name in ("query", "key", "value")}
    assert sliced == heads | {"attention.output.dense"}
    with oracle.masked_reference(model, record):
        oracle.assert_close(got, oracle.step(model, data), 1e-9)


def test_only_context_tokens_count() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches(1)[0]
    compiled(model, plan_of(tokens="context"))
    kept: list[Tensor] = []
    down = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer")
    hook = down.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().clone()))
    model.eval()
    model(**data)
    hook.remove()
    model.train()
    slx.step(model, 0)
    oracle.step(model, data)
    # Token t is dense if label t + 1 carries loss.
    predicts = torch.nn.functional.pad(data["labels"][:, 1:] != -100, (0, 1))
    context = data["attention_mask"].bool() & ~predicts
    assert 0 < context.sum() < data["attention_mask"].sum()
    moment = moments_of(model)[f"{SITE}mlp.down_proj"]
    assert moment.count == int(context.sum())
    expected = kept[0][context].square().mean(dim=0)
    assert oracle.difference(moment.square(), expected) <= 1e-9


@pytest.mark.slow
def test_what_counts_and_what_does_not() -> None:
    model, (data, other) = oracle.llama(), batches(2)
    compiled(model)
    slx.step(model, 0)
    oracle.step(model, data)
    count, other_count = (int(d["attention_mask"].sum()) for d in (data, other))
    assert tokens_seen(model) == {count}
    model.eval()
    model(**data)
    model.train()
    with torch.no_grad():
        model(**data)
    slx.warm_up(model, data)
    assert tokens_seen(model) == {count} and collector_of(model).calls == 1
    oracle.step(model, other)  # accumulation: a second forward of the same optimizer step
    assert tokens_seen(model) == {count + other_count}
    assert "calibration: 2 dense calls observed, 7 of 7 linears" in slx.explain(model, verbose=True)


@pytest.mark.parametrize(
    ("regional", "reentrant"), [slow(False, False), (True, False), slow(True, True)],
    ids=["whole", "regional", "regional-reentrant"],
)  # fmt: skip
def test_a_recomputed_forward_counts_once(regional: bool, reentrant: bool) -> None:
    model, data = oracle.llama(dtype=torch.float64), batches(1)[0]
    expected = offline(model, [data])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compiled(model, regional=regional, backend="aot_eager")
    slx.step(model, 0)
    oracle.step(model, data)
    assert tokens_seen(model) == {int(data["attention_mask"].sum())}
    assert_same(collector_of(model).build(), expected)


@pytest.mark.parametrize("ahead", ["precompile", "warm_up"])
def test_nothing_is_compiled_at_the_switch_after_compiling_ahead(ahead: str) -> None:
    model, data = tiny(), batches(1)[0]
    compiled(model, of_ffn(plan_of(start=2, end_step=4)), precompile=ahead == "precompile")
    slx.step(model, 0)
    if ahead == "warm_up":
        slx.warm_up(model, data)
    oracle.step(model, data)
    graphs = get_runtime(model).graphs
    assert graphs == 2 and collector_of(model).calls == 1
    for n in range(1, 6):
        slx.step(model, n)
        with slx.record(model) as record:
            oracle.step(model, data)
        assert bool(record.selections) == (n in (2, 3))
    assert get_runtime(model).graphs == graphs
    assert collector_of(model).calls == 2 and not collector_of(model).moments


def test_the_switch_compiles_the_sparse_graph_and_no_other() -> None:
    model, data = tiny(), batches(1)[0]
    compiled(model, of_ffn(plan_of()))
    graphs = []
    for n in range(5):
        slx.step(model, n)
        oracle.step(model, data)
        graphs.append(get_runtime(model).graphs)
    assert graphs == [1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_observing_adds_no_graph_for_other_lengths(dynamic: bool | None) -> None:
    counts = []
    for calibrate in (False, True):
        model = oracle.llama()
        if calibrate:
            compiled(model, plan_of(start=9), dynamic=dynamic)
        else:
            late = slx.SparsityPlan(KEYS, start_step=9)
            slx.compile(
                model, oracle.estimator_of(model), plan=late, backend="eager", dynamic=dynamic
            )
        for n, length in enumerate((16, 9, 128, 30)):  # 2 * 128 tokens: as many as rows are taken
            slx.step(model, n)
            oracle.step(model, oracle.batch(2, length))
        counts.append(get_runtime(model).graphs)
        torch.compiler.reset()
    assert counts[1] == counts[0] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_moments_in_float32(dtype: torch.dtype) -> None:
    model, data = oracle.llama(dtype=dtype), batches(2)
    compiled(model, plan_of(start=2))
    run_dense_phase(model, data)
    assert {m.second.dtype for m in moments_of(model).values()} == {torch.float32}
    slx.step(model, 2)
    assert torch.isfinite(oracle.step(model, data[0]).loss)
    estimator = collector_of(model).estimator
    assert estimator is not None and estimator.calibrated
    assert {pair.a.dtype for pair in estimator.factors.values()} == {dtype}


@pytest.mark.slow
def test_under_autocast_moments_and_factors_stay_in_float32() -> None:
    """The call, and with it the sums and the factorisation, run inside the user's autocast."""
    model, data = oracle.llama(), batches(1)[0]
    read: list[Tensor] = []
    gate = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj.base_layer")
    hook = gate.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        model(**data)
    hook.remove()
    x = read[0][data["attention_mask"].bool()].double()
    compiled(model, plan_of(start=1))
    with torch.autocast("cpu", torch.bfloat16):
        slx.step(model, 0)
        oracle.step(model, data)
        moment = moments_of(model)[f"{SITE}mlp.gate_proj"]
        slx.step(model, 1)
        oracle.step(model, data)
    assert moment.second.dtype == torch.float32
    covariance = torch.cov(x.t(), correction=0)
    assert oracle.difference(moment.covariance(), covariance) <= 1e-5
    # The factors are those of that moment, computed outside autocast.
    w = next(w for w in frozen_weights(model) if w.canonical == f"{SITE}mlp.gate_proj")
    expected, _, _ = aware_factors(
        w.logical(), moment.mean(), moment.covariance(), 4, damping=DAMPING, seed=0
    )
    estimator = collector_of(model).estimator
    assert estimator is not None
    assert torch.equal(estimator.factors[w.canonical].a, expected.a)


@pytest.mark.slow
def test_state_dict_and_restore() -> None:
    model, data = oracle.llama(), batches(1)[0]
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    compiled(model, plan_of(start=1))
    for n in range(2):
        slx.step(model, n)
        oracle.step(model, data)
        assert list(model.state_dict()) == before["keys"]
    compiled(model, plan_of(start=1))  # begins anew
    assert collector_of(model).calls == 0 and collector_of(model).estimator is None
    slx.restore(model)
    oracle.assert_untouched(model, before, weights)


def assert_plain(model: nn.Module) -> None:
    """The factors in place, those of producers, are those of the paper's estimator."""
    plain = slx.SVDEstimator.build(model, rank=4, progress=False)
    placed = {w.canonical: w.module._buffers["_sparselora_a_weight"] for w in frozen_weights(model)}
    held = {name: a for name, a in placed.items() if a is not None and len(a)}
    assert {name.split(".")[-1] for name in held} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    assert all(torch.equal(a, plain.factors[name].a) for name, a in held.items())


def test_an_undriven_schedule_falls_back_to_plain_factors() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches(1)[0]
    compiled(model)
    missed = pytest.warns(UserWarning, match="no dense training call was observed")
    with missed, slx.record(model) as record:
        done = oracle.step(model, data)
    assert_plain(model)
    slx.restore(model)
    oracle.assert_rewrote(record, model, KEYS)
    oracle.assert_close(done, oracle.reference_step(model, data, record), 1e-9)


@pytest.mark.slow
def test_a_plan_without_a_dense_step_is_the_papers_estimator() -> None:
    model, data = oracle.llama(), batches(1)[0]
    with pytest.warns(UserWarning, match="leaves no dense step"):
        compiled(model, plan_of(start=0))
    assert_plain(model)
    assert get_runtime(model).collector is None
    with slx.record(model) as record:
        oracle.step(model, data)
    slx.restore(model)
    plain = slx.SVDEstimator.build(model, rank=4, progress=False)
    assert channels(model, plain, data) == as_lists(record)


def test_the_prior_alone_needs_observations() -> None:
    model = compiled(oracle.llama(), plan_of(score="prior"))
    undriven = pytest.warns(UserWarning, match="nothing drives")
    with undriven, pytest.raises(slx.EstimatorError, match="prior alone"):
        oracle.step(model, batches(1)[0])


def test_observing_inf_says_where() -> None:
    model, data = oracle.llama(), batches(1)[0]
    compiled(model, plan_of(start=1))
    slx.step(model, 0)
    oracle.step(model, data)
    collector_of(model).moments[f"{SITE}mlp.gate_proj"].second[0, 0] = float("inf")
    slx.step(model, 1)
    with pytest.raises(slx.EstimatorError, match=r"gate_proj.*inf or NaN"):
        oracle.step(model, data)


@pytest.mark.parametrize("value", ["dense", True, 3, ["dense_phase"]])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(slx.PlanError, match="allowed: 'dense_phase'"):
        slx.SparsityPlan(0.5, calibrate=value)


def test_yaml_round_trip(tmp_path: Path) -> None:
    plan_of().to_yaml(tmp_path / "plan.yaml")
    assert slx.SparsityPlan.from_yaml(tmp_path / "plan.yaml") == plan_of()


def test_an_estimator_or_calibration_not_both() -> None:
    model = oracle.llama()
    with pytest.raises(slx.CompileError, match=r"SVDEstimator\.build.*dense first steps"):
        slx.compile(model, "estimator.safetensors", plan=0.5)  # type: ignore[arg-type]
    with pytest.raises(slx.CompileError, match="leave one of them out"):
        slx.compile(model, oracle.estimator_of(model), plan=plan_of())
    with pytest.raises(slx.EstimatorError, match="exceeds every weight"):
        compiled(model, plan_of(rank=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(model, slx.SparsityPlan({"layers.0": 0.0}, calibrate="dense_phase"))
