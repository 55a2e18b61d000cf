"""Factors lie on the modules whose graphs read them."""

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.model.attributes import buffer_name
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle

CONSUMERS = ("o_proj", "down_proj")


def bytes_of_factors(model: nn.Module) -> dict[str, int]:
    """What the factors beside each linear take, by its name in a layer."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for what in "ab":
            held = module._buffers.get(buffer_name("weight", what))
            if held is not None:
                short = name.removesuffix(".base_layer").rpartition(".")[2]
                found[short] = found.get(short, 0) + held.nbytes
    return found


def test_factors_of_consumers_are_not_placed() -> None:
    """Two layers of Llama at rank 4: 17 KiB of factors instead of 25."""
    model = oracle.llama(layers=2)
    estimator = oracle.estimator_of(model)
    every = sum(part.nbytes for pair in estimator.factors.values() for part in (pair.a, pair.b))
    assert every == 25600
    slx.compile(model, estimator, plan=oracle.plan_of(oracle.mixed(model)), backend="eager")
    placed = bytes_of_factors(model)
    assert {name for name, size in placed.items() if not size} == set(CONSUMERS)
    assert sum(placed.values()) == 17408
    slx.restore(model)
    assert not bytes_of_factors(model)


def with_values_last() -> nn.Module:
    """Attention whose values look like the projection behind it: as wide, and the last linear."""
    model = oracle.llama(kv_heads=6)
    for module in model.modules():
        if hasattr(module, "v_proj"):
            module.v_proj = module._modules.pop("v_proj")
    return model


def test_a_producer_that_was_taken_for_a_consumer() -> None:
    """It gets its factors when the first graph asks for them, and the call begins anew."""
    model = with_values_last()
    model.double()
    data, plan = oracle.batch(), {"layers.0.self_attn": 0.5}
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(plan), backend="eager")
    assert bytes_of_factors(model)["v_proj"] == 0 < bytes_of_factors(model)["o_proj"]
    with slx.record(model) as record:
        done = oracle.step(model, data)
    assert bytes_of_factors(model)["v_proj"] > 0
    assert get_runtime(model).graphs == 1
    slx.restore(model)
    oracle.assert_rewrote(record, model, plan)
    oracle.assert_close(done, oracle.reference_step(model, data, record), 1e-12)


@pytest.mark.slow
def test_factors_that_come_from_training_are_given_too() -> None:
    """Online calibration makes them after a graph may have asked for them: `explain` does, as a
    step would."""
    model, data = with_values_last(), oracle.batch()
    plan = slx.SparsityPlan(
        {"layers.0.self_attn": 0.5},
        tokens="all", start_step=1, score="strided", calibrate="dense_phase",
    )  # fmt: skip
    slx.compile(model, plan=plan, backend="eager")
    slx.step(model, 0)
    oracle.step(model, data)
    slx.step(model, 1)
    assert "4 of 7 frozen linears rewritten" in slx.explain(model, data)
    runtime = get_runtime(model)
    runtime.end_online_calibration()  # as the first sparse step does
    assert runtime.collector is not None and runtime.collector.estimator is not None
    (weight,) = (w for w in runtime.frozen if "v_proj" in w.name)
    placed = weight.module._buffers[buffer_name("weight", "a")]
    assert placed is not None
    assert torch.equal(placed, runtime.collector.estimator.factors[weight.canonical].a)
