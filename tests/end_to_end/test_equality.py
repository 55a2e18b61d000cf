"""Sliced equals masked-dense: the loss and the gradient of every adapter weight."""

import copy
from typing import Any

import pytest
import torch

import sparselora_fx as slx
from tests.support import oracle
from tests.support.slow import slow

BOUND = {torch.float64: 1e-9, torch.float32: 1e-4}
TARGETS = {"attention": oracle.ATTENTION_TARGETS, "all": "all-linear"}


def check(model: Any, data: Any = None, *, lora_branch: str = "dense", **options: Any) -> None:
    """One compiled step equals the masked one; layers that the model lacks leave the plan."""
    data = oracle.batch() if data is None else data
    plan = oracle.mixed(model)
    given, options = oracle.plan_of(plan), {"backend": "aot_eager", **options}
    got = oracle.run_compiled(model, data, given, lora_branch=lora_branch, **options)
    expected = oracle.reference_step(model, data, got.record, lora_branch=lora_branch)
    oracle.assert_rewrote(got.record, model, plan)
    bound = BOUND[expected.loss.dtype]
    if options.get("backend") == "inductor":  # the loss is fp32; see test_layers.check
        bound = max(bound, 5e-6)
    oracle.assert_close(got, expected, bound)


@pytest.mark.parametrize(
    ("dtype", "targets", "lora_branch"),
    [
        (torch.float64, "attention", "sparse"),
        (torch.float64, "all", "dense"),
        slow(torch.float32, "attention", "dense"),
        slow(torch.float32, "all", "sparse"),
    ],
)
def test_llama_equals_its_masked_self(dtype: torch.dtype, targets: str, lora_branch: str) -> None:
    """Every pair of values of the three (four of eight combinations)."""
    model = oracle.llama(targets=TARGETS[targets], dtype=dtype, layers=2)
    check(model, lora_branch=lora_branch)


def test_masking_matters() -> None:
    """The comparison can fail: the dense model is far away from the sliced one."""
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    sliced = oracle.run_compiled(model, data)
    assert oracle.worst_difference(sliced, oracle.step(model, data))[0] > 0.05


@pytest.mark.parametrize("lora_branch", ["dense", slow("sparse")])
def test_biases_stay_at_full_width(lora_branch: str) -> None:
    check(oracle.llama(bias=True, dtype=torch.float64), lora_branch=lora_branch)


@pytest.mark.parametrize("lora_branch", ["dense", slow("sparse")])
@pytest.mark.parametrize("targets", [slow("attention"), "all"])
def test_lora_dropout_draws_the_same_mask(targets: str, lora_branch: str) -> None:
    model = oracle.llama(targets=TARGETS[targets], dropout=0.1, dtype=torch.float64)
    check(model, lora_branch=lora_branch)


@pytest.mark.parametrize("lora_branch", ["dense", slow("sparse")])
def test_two_active_adapters(lora_branch: str) -> None:
    model = oracle.llama()
    model.add_adapter("second", oracle.lora_config(oracle.ATTENTION_TARGETS))
    model.base_model.set_adapter(["default", "second"])
    oracle.randomise(model).to(torch.float64)
    both = [n for n, p in model.named_parameters() if p.requires_grad and ".second." in n]
    assert both
    check(model, lora_branch=lora_branch, backend="eager")


def test_written_out_attention() -> None:
    check(oracle.llama(attention="eager", dtype=torch.float64), backend="eager")


@pytest.mark.private_torch
@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager"])
def test_every_fast_backend(backend: str) -> None:
    check(oracle.llama(dtype=torch.float64), backend=backend)


@pytest.mark.private_torch
@pytest.mark.slow
@pytest.mark.parametrize("lora_branch", ["dense", "sparse"])
def test_inductor(lora_branch: str) -> None:
    check(oracle.llama(dtype=torch.float32), backend="inductor", lora_branch=lora_branch)


@pytest.mark.slow
def test_inductor_fp64_with_biases() -> None:
    check(oracle.llama(dtype=torch.float64, bias=True), backend="inductor")


@pytest.mark.parametrize(("multiple", "kept"), [(1, (28, 44)), slow(16, (32, 48))])
def test_channel_multiple(multiple: int, kept: tuple[int, int]) -> None:
    model, data = oracle.llama(layers=2, dtype=torch.float64), oracle.batch()
    plan = oracle.plan_of({"layers.0.mlp": 0.75, "layers.1.mlp": 0.6}, multiple)
    got = oracle.run_compiled(model, data, plan)
    assert tuple(len(c["ffn"]) for c in got.record.selections.values()) == kept
    oracle.assert_close(got, oracle.reference_step(model, data, got.record), 1e-9)


def test_one_channel_is_kept_at_the_least() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    got = oracle.run_compiled(model, data, oracle.plan_of(0.999))
    kept = {len(rows) for chosen in got.record.selections.values() for rows in chosen.values()}
    assert kept == {1}
    oracle.assert_close(got, oracle.reference_step(model, data, got.record), 1e-9)


def test_bf16_stays_within_its_budget() -> None:
    """bf16 rounds differently when sliced; the error against fp64 must not be worse than dense's.

    Budget: twice the error that the eager masked model itself makes in bf16, plus bf16's spacing.
    """
    model, data = oracle.llama(dtype=torch.bfloat16), oracle.batch()
    exact = copy.deepcopy(model).to(torch.float64)
    got = oracle.run_compiled(model, data)
    masked = oracle.reference_step(model, data, got.record)
    truth = oracle.reference_step(exact, data, got.record)
    budget = 2 * oracle.worst_difference(masked, truth)[0] + torch.finfo(torch.bfloat16).eps
    assert budget < 0.25, f"the budget {budget:.3f} would accept anything"
    oracle.assert_close(got, truth, budget)


def test_autocast_over_fp32_weights() -> None:
    model, data = oracle.llama(), oracle.batch()
    exact = copy.deepcopy(model).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = oracle.run_compiled(model, data)
        masked = oracle.reference_step(model, data, got.record)
    truth = oracle.reference_step(exact, data, got.record)
    budget = 2 * oracle.worst_difference(masked, truth)[0] + torch.finfo(torch.bfloat16).eps
    assert budget < 0.25, f"the budget {budget:.3f} would accept anything"
    oracle.assert_close(got, truth, budget)


@pytest.mark.parametrize("attention", ["sdpa", slow("eager")])
def test_padding_content_changes_nothing(attention: str) -> None:
    model = oracle.llama(attention=attention, dtype=torch.float64)
    data = oracle.batch(padding=4)
    noise = torch.randint_like(data["input_ids"], 1, oracle.VOCABULARY)
    other = {
        **data,
        "input_ids": torch.where(data["attention_mask"] == 0, noise, data["input_ids"]),
    }
    plan = oracle.plan_of(oracle.mixed(model))
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    steps = []
    for given in (data, other):
        with slx.record(model) as record:
            steps.append(oracle.step(model, given))
        steps[-1].record = record
    first, second = steps
    assert first.record.sites
    assert first.record.sites.keys() == second.record.sites.keys()
    for name, (_, rows) in first.record.sites.items():
        assert torch.equal(rows, second.record.sites[name][1]), name
    oracle.assert_close(second, first, 1e-9)


def test_a_batch_without_a_mask() -> None:
    data = oracle.batch(padding=0)
    del data["attention_mask"]
    check(oracle.llama(dtype=torch.float64), data, backend="eager")


def test_inputs_embeds() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    data["inputs_embeds"] = model.get_input_embeddings()(data.pop("input_ids")).detach()
    check(model, data, backend="eager")
