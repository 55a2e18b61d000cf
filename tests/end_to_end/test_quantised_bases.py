"""LoRA on a quantised base: sliced equals masked-dense over the dequantised weights, in fp64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaForCausalLM

import sparselora_fx as slx
from benchmarks.support.measuring import peak_memory
from sparselora_fx.model import unpacking
from sparselora_fx.model.frozen_weights import frozen_weights
from tests.support import oracle
from tests.support.quantised_models import (
    BYTES,
    DOUBLE,
    FP4,
    NF4,
    dequantised,
    quantised_llama,
)
from tests.support.slow import slow

PLAN = {"mlp": 0.75, "self_attn": 0.5}
KINDS = [
    pytest.param(NF4, id="nf4"),
    pytest.param(FP4, id="fp4", marks=pytest.mark.slow),
    pytest.param(DOUBLE, id="double", marks=pytest.mark.slow),
]


def run(model: Any, data: Any, plan: Any = None, **options: Any) -> oracle.Step:
    options = {"backend": "eager", **options}
    return oracle.run_compiled(model, data, plan or oracle.plan_of(PLAN), restore=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_equal_masked_dense(tmp_path: Path, kind: dict[str, Any]) -> None:
    model, data = quantised_llama(tmp_path, kind, bias=True), oracle.batch()
    plain = dequantised(model)
    got = run(model, data, backend="aot_eager" if kind is NF4 else "eager")
    oracle.assert_rewrote(got.record, plain, PLAN)
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 2e-5)
    table = slx.explain(model, verbose=True)
    assert table.count("unpacked from bitsandbytes " + kind["bnb_4bit_quant_type"]) == 7
    assert "7 of 7 frozen linears rewritten" in table


def test_output_tokens_stay_dense(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    data["labels"][:, :5] = -100
    plan = slx.SparsityPlan(PLAN, start_step=0, channel_multiple=1)
    plain, estimator = dequantised(model), oracle.estimator_of(model)
    got = run(model, data, plan)
    slx.compile(plain, estimator, plan=plan, backend="eager")
    with slx.record(plain) as record:
        expected = oracle.step(plain, data)
    assert len(record.sites) == 7
    for name, (role, rows) in record.sites.items():
        assert got.record.sites[name][0] == role and torch.equal(got.record.sites[name][1], rows)
    oracle.assert_close(got, expected, 2e-5)


@pytest.mark.slow
def test_sparsity_zero_is_plain_compile(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    expected = oracle.plain_compiled_step(model, data, "aot_eager")
    dense = oracle.plan_of({"mlp": 0.0, "self_attn": 0.0}, 16)
    got = run(model, data, dense, backend="aot_eager")
    oracle.assert_identical(got, expected)
    assert not got.record.sites


@pytest.mark.slow
def test_checkpointed_blocks(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, DOUBLE), oracle.batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    plain = dequantised(model)
    got = run(model, data, backend="aot_eager")
    assert len(got.record.sites) == 7
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 2e-5)


@pytest.mark.slow
def test_as_peft_prepares_it_for_training(tmp_path: Path) -> None:
    """Norms and embeddings in fp32, products in bfloat16, blocks checkpointed."""
    model = quantised_llama(tmp_path, NF4, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    data, plain = oracle.batch(), dequantised(model)
    got = run(model, data)
    assert len(got.record.sites) == 7
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 0.08)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_eight_bits_equal_masked_dense(tmp_path: Path, dtype: torch.dtype) -> None:
    model, data = quantised_llama(tmp_path, BYTES, dtype=dtype, bias=True), oracle.batch()
    plain = dequantised(model)
    got = run(model, data, backend="aot_eager" if dtype == torch.float32 else "eager")
    oracle.assert_rewrote(got.record, plain, PLAN)
    bound = 2e-5 if dtype == torch.float32 else 0.08
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), bound)
    assert slx.explain(model, verbose=True).count("unpacked from bitsandbytes int8") == 7


def test_outliers_of_eight_bits(tmp_path: Path) -> None:
    """Inputs above LLM.int8's threshold (6): on a CPU training multiplies with the dequantised
    weight whatever they are, in the quantiser's own products and in ours."""
    model, data = quantised_llama(tmp_path, BYTES), oracle.batch()
    largest: list[float] = []
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.weight.data.mul_(4)  # type: ignore[union-attr, operator]
        if name.endswith("up_proj"):
            assert module.base_layer.state.threshold == 6  # type: ignore[union-attr]
            looked = module.register_forward_pre_hook(
                lambda m, x: largest.append(float(x[0].abs().max()))
            )
    plain = dequantised(model)
    own = oracle.step(model, data)
    looked.remove()
    assert max(largest) > 12
    oracle.assert_close(own, oracle.step(plain, data), 2e-5)
    got = run(model, data)
    oracle.assert_rewrote(got.record, plain, PLAN)
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 2e-5)


@pytest.mark.slow
def test_a_step_takes_no_more_memory_than_a_dense_one(tmp_path: Path) -> None:
    """Weights, copies by column and factors included."""
    sizes = {"hidden": 128, "width": 512, "layers": 2}
    model, data = quantised_llama(tmp_path, NF4, **sizes), oracle.batch(samples=4, length=128)
    twin = quantised_llama(tmp_path, NF4, **sizes)
    plain = torch.compile(twin, backend="aot_eager")
    plan = oracle.plan_of({"mlp": 0.9, "self_attn": 0.5})
    slx.compile(model, oracle.estimator_of(model, 2), plan=plan, backend="aot_eager")
    peaks = []
    for call, whose in ((plain, twin), (model, model)):
        for _ in range(2):
            call(**data).loss.backward()
        peaks.append(peak_memory(whose, lambda call=call: call(**data).loss.backward()))
    assert peaks[1] <= peaks[0]


def test_the_lora_branch_sparse_too(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    plain = dequantised(model)
    got = run(model, data, lora_branch="sparse")
    expected = oracle.reference_step(plain, data, got.record, lora_branch="sparse")
    oracle.assert_close(got, expected, 2e-5)


@pytest.mark.slow
def test_the_dense_phase_makes_an_estimator(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    plain = dequantised(model)
    plan = slx.SparsityPlan(
        PLAN, tokens="all", start_step=2, channel_multiple=1, calibrate="dense_phase"
    )
    slx.compile(model, plan=plan, backend="eager")
    for n in range(2):
        slx.step(model, n, 8)
        oracle.step(model, data)
    slx.step(model, 2, 8)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    assert len(record.sites) == 7
    oracle.assert_close(got, oracle.reference_step(plain, data, record), 2e-5)


@pytest.mark.slow
def test_only_kept_elements_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S x K of each producer and N x S of each consumer, once in the forward and once in the
    backward; no whole matrix."""
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    model.enable_input_require_grads()
    made: list[int] = []
    kernel = unpacking._kernel

    def counting(*args: Any) -> torch.Tensor:
        values = kernel(*args)
        made.append(values.numel())
        return values

    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(PLAN), backend="eager")
    monkeypatch.setattr(unpacking, "_kernel", counting)
    with slx.record(model) as record:
        oracle.step(model, data)
    expected = []
    for weight in frozen_weights(model):
        role, rows = record.sites[weight.name]
        other = weight.in_features if role == "out" else weight.out_features
        expected += [len(rows) * other] * 2
    assert sorted(made) == sorted(expected)


def test_the_estimator_is_that_of_the_values(tmp_path: Path) -> None:
    model = quantised_llama(tmp_path, NF4)
    made, expected = (oracle.estimator_of(m) for m in (model, dequantised(model).float()))
    assert made.factors.keys() == expected.factors.keys()
    assert made.fingerprint == expected.fingerprint
    for name, (a, b) in expected.factors.items():
        ours = made.factors[name]
        torch.testing.assert_close(ours.a @ ours.b, a @ b, rtol=1e-4, atol=1e-5)
    made.save(tmp_path / "estimator.safetensors")
    slx.SVDEstimator.load(tmp_path / "estimator.safetensors").check(model)


@pytest.mark.parametrize("words", [NF4, FP4, BYTES], ids=["nf4", "fp4", "int8"])
def test_the_estimator_is_near_that_of_the_full_precision_base(tmp_path: Path, words: Any) -> None:
    """The same entries in the same shapes, which fit the full-precision weights as well, to second
    order in what quantising changed."""
    model = quantised_llama(tmp_path, words)
    full = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), oracle.lora_config())
    made, expected = oracle.estimator_of(model), oracle.estimator_of(full)
    assert made.factors.keys() == expected.factors.keys()
    plain = {weight.canonical: weight.logical() for weight in frozen_weights(full)}
    for weight in frozen_weights(model):
        ours, theirs = (e.factors[weight.canonical] for e in (made, expected))
        assert (ours.a.shape, ours.b.shape) == (theirs.a.shape, theirs.b.shape)
        values = plain[weight.canonical]
        error = float((weight.logical() - values).norm() / values.norm())
        left, best = ((values - f.a @ f.b).norm() for f in (ours, theirs))
        assert 0 < error < 0.15 and left <= best * (1 + error**2 + 1e-5)


@pytest.mark.slow
def test_four_bits_in_native_code(tmp_path: Path) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    plain = dequantised(model)
    got = run(model, data, backend="inductor")
    assert len(got.record.sites) == 7
    oracle.assert_close(got, oracle.reference_step(plain, data, got.record), 2e-5)
