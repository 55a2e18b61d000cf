"""Where nothing is skipped nothing changes: sparsity 0, evaluation, generation, restore."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.slow import slow


@pytest.mark.private_torch
@pytest.mark.parametrize(
    ("backend", "zero"),
    [
        slow("eager", "number"),
        ("aot_eager", "number"),
        slow("inductor", "number"),
        slow("eager", "mapping"),
        slow("aot_eager", "mapping"),
        slow("inductor", "mapping"),
    ],
)
def test_plan_zero_is_plain_compile_bit_for_bit(backend: str, zero: str) -> None:
    model, data = oracle.llama(bias=True), oracle.batch()
    expected = oracle.plain_compiled_step(model, data, backend)
    plan = oracle.plan_of(0.0 if zero == "number" else {"mlp": 0.0, "self_attn": 0.0}, 16)
    got = oracle.run_compiled(model, data, plan, backend, restore=False)
    oracle.assert_identical(got, expected)
    assert got.record.sites == {} and got.record.selections == {}
    assert "0 of 7 frozen linears rewritten" in slx.explain(model, verbose=True)


@pytest.mark.slow
def test_plan_zero_with_dropout() -> None:
    model, data = oracle.llama(dropout=0.2), oracle.batch()
    expected = oracle.plain_compiled_step(model, data, "aot_eager")
    got = oracle.run_compiled(model, data, oracle.plan_of(0.0), "aot_eager")
    oracle.assert_identical(got, expected)


@pytest.mark.slow
def test_a_plan_that_keeps_every_channel_is_plain_compile() -> None:
    """k rounds up to all channels: the same as sparsity 0."""
    model, data = oracle.llama(), oracle.batch()
    expected = oracle.plain_compiled_step(model, data, "aot_eager")
    got = oracle.run_compiled(model, data, oracle.plan_of(0.05, 112), "aot_eager", restore=False)
    oracle.assert_identical(got, expected)
    assert "k rounds up to all of its channels" in slx.explain(model, verbose=True)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, 0.05])
def test_padding_changes_nothing_either(level: float) -> None:
    """Tokens are split, and some are padding: nothing is left out of a model without a choice."""
    model, data = oracle.llama(layers=2), oracle.batch(padding=3)
    data["labels"][:, :4] = -100
    expected = oracle.plain_compiled_step(model, data, "eager")
    plan = slx.SparsityPlan({"mlp": level}, start_step=0, channel_multiple=112)
    oracle.assert_identical(oracle.run_compiled(model, data, plan), expected)


def logits(model: nn.Module, data: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**data).logits


def generated(model: nn.Module, data: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    out = model.generate(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return (out.sequences, *out.logits)


def graphs(model: nn.Module) -> tuple[int, int]:
    return get_runtime(model).graphs, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("peft", [True, slow(False)], ids=["peft", "no peft"])
def test_evaluation_and_generation_are_the_users_own(peft: bool) -> None:
    model, data = oracle.llama(), oracle.batch(padding=0)
    if not peft:
        model = model.merge_and_unload()
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    model.eval()
    expected, tokens = logits(model, data), generated(model, data)
    slx.compile(
        model,
        oracle.estimator_of(model),
        plan=oracle.plan_of(oracle.mixed(model)),
        backend="eager",
    )
    model.train()
    with slx.record(model) as record:
        oracle.step(model, data)
    assert record.sites
    model.eval()
    before = graphs(model)
    assert torch.equal(logits(model, data), expected)
    for got, wanted in zip(generated(model, data), tokens, strict=True):
        assert torch.equal(got, wanted)
    assert graphs(model) == before
    model.train()
    oracle.step(model, data)
    assert graphs(model) == before, "training again recompiled"


def test_generation_in_training_mode_is_dense_too() -> None:
    """A model without PEFT generates with the very forward that is compiled."""
    model, data = oracle.llama().merge_and_unload(), oracle.batch(padding=0)
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    model.train()
    expected = generated(model, data)
    plan = oracle.plan_of(oracle.mixed(model))
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    oracle.step(model, data)
    before = graphs(model)
    for got, wanted in zip(generated(model, data), expected, strict=True):
        assert torch.equal(got, wanted)
    assert graphs(model) == before


def test_recording_sees_nothing_in_evaluation() -> None:
    model, data = oracle.llama(), oracle.batch()
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.75), backend="aot_eager")
    model.eval()
    with slx.record(model) as record:
        logits(model, data)
    assert record.sites == {} and get_runtime(model).graphs == 0


@pytest.mark.slow
def test_compiled_evaluation_is_dense() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    model.eval()
    expected = logits(model, data)
    slx.compile(
        model,
        oracle.estimator_of(model),
        plan=oracle.plan_of(0.75),
        backend="aot_eager",
        compile_eval=True,
    )
    assert oracle.difference(logits(model, data), expected) <= 1e-9
    assert get_runtime(model).graphs > 0
    model.train()
    with slx.record(model) as record:
        oracle.step(model, data)
    assert record.sites, "the training graph was not made after an evaluation graph"
    model.eval()
    assert oracle.difference(logits(model, data), expected) <= 1e-9


def test_restore_leaves_no_trace() -> None:
    model, data = oracle.llama(), oracle.batch()
    expected = oracle.step(model, data)
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    sliced = oracle.run_compiled(model, data)
    assert not torch.equal(sliced.loss, expected.loss)
    oracle.assert_untouched(model, before, weights)
    oracle.assert_identical(oracle.step(model, data), expected)


def test_restore_keeps_a_forward_of_the_users() -> None:
    model, data = oracle.llama(), oracle.batch()
    own, calls = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    forward.model = forward.state = forward.original = None  # ours must not be overwritten by these
    model.__dict__["forward"] = forward
    oracle.run_compiled(model, data, backend="eager")
    assert model.__dict__["forward"] is forward and calls
