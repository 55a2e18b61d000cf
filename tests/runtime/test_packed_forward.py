"""A quantised model between `compile` and `restore`: its storage, its evaluation, its copies."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.model.packed import REPACKS
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.quantised_models import BYTES, DOUBLE, NF4, dequantised, quantised_llama
from tests.support.slow import slow

PLAN = {"mlp": 0.5, "self_attn": 0.5}


def compiled(
    folder: Path, words: Any = NF4, *, regional: bool = False, **options: Any
) -> nn.Module:
    model = quantised_llama(folder, words, **options)
    return slx.compile(
        model, oracle.estimator_of(model), plan=oracle.plan_of(PLAN), backend="eager",
        regional=regional,
    )  # fmt: skip


def assert_correct(model: nn.Module) -> oracle.Step:
    """A step of a compiled model is the masked-dense one of its present weights."""
    with slx.record(model) as record:
        got = oracle.step(model, oracle.batch())
    got.record = record
    expected = oracle.reference_step(dequantised(model), oracle.batch(), record)
    assert len(record.sites) == 7
    oracle.assert_close(got, expected, 2e-5)
    return got


@pytest.mark.parametrize("words", [slow(NF4), DOUBLE, BYTES], ids=["nf4", "double", "int8"])
def test_restore_leaves_the_storage_as_it_was(tmp_path: Path, words: Any) -> None:
    model = quantised_llama(tmp_path, words)
    oracle.step(model, oracle.batch())  # int8 moves its scales in the first one
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(PLAN), backend="eager")
    oracle.step(model, oracle.batch())
    assert list(model.state_dict()) == list(weights)
    slx.restore(model)
    oracle.assert_untouched(model, before, weights)


class Doubled(bnb.nn.Linear4bit):
    """A quantised linear that computes more than a product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["instance", "subclass"])
def test_a_linear_with_a_forward_of_its_own_is_dense_and_says_so(tmp_path: Path, kind: str) -> None:
    model = quantised_llama(tmp_path, NF4)
    linear: Any = next(m for n, m in model.named_modules() if n.endswith("up_proj.base_layer"))
    if kind == "subclass":
        linear.__class__ = Doubled
    else:
        plain = linear.forward
        linear.forward = lambda x: 2 * plain(x)
    expected = oracle.step(model, oracle.batch())
    plan = oracle.plan_of({"mlp": 0.5})
    with pytest.warns(UserWarning, match="its forward is not the quantiser's"):
        slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    with slx.record(model) as record:
        got = oracle.step(model, oracle.batch())
    assert not record.sites
    oracle.assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("words", [DOUBLE, slow(BYTES)], ids=["nf4", "int8"])
def test_graphs_of_blocks_do_not_grow_with_depth(tmp_path: Path, words: Any) -> None:
    """Quantised linears that are alike are one to Dynamo, so that blocks share graphs."""
    found = []
    for layers in (2, 4):
        torch.compiler.reset()
        model = compiled(tmp_path / str(layers), words, layers=layers, regional=True)
        for seed in (1, 2):
            oracle.step(model, oracle.batch(seed=seed))
        found.append(get_runtime(model).graphs)
    assert found[0] == found[1]


def test_evaluation_does_not_store_weights_anew(tmp_path: Path) -> None:
    """On a CPU with bfloat16 products, bitsandbytes does so, and training ends there."""
    model = compiled(tmp_path)
    for weight in frozen_weights(model):
        assert not getattr(weight.module, REPACKS)
    weights = oracle.copy_of_weights(model)
    model.eval()
    with torch.no_grad():
        loss = model(**oracle.batch()).loss
    expected = dequantised(model).eval()(**oracle.batch()).loss
    assert abs(float(loss) - float(expected)) < 1e-4
    model.train()
    assert_correct(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_calibration_does_not_either(tmp_path: Path) -> None:
    model = quantised_llama(tmp_path, NF4)
    weights = oracle.copy_of_weights(model)
    made = slx.SVDEstimator.build(model, 4, calibration=[oracle.batch()], progress=False)
    assert made.calibrated
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    plain = dequantised(model).float()
    expected = slx.SVDEstimator.build(plain, 4, calibration=[oracle.batch()], progress=False)
    for name, (a, b) in expected.factors.items():
        ours = made.factors[name]
        torch.testing.assert_close(ours.a @ ours.b, a @ b, rtol=1e-3, atol=1e-4)


def test_an_adapter_merged_and_taken_out_again(tmp_path: Path) -> None:
    """The base is quantised anew each time: a step is that of the weights that stand there now."""
    model = compiled(tmp_path)
    first = assert_correct(model)
    old = [weight.weight for weight in frozen_weights(model)]
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(w.weight is not was for w, was in zip(frozen_weights(model), old, strict=True))
    assert not torch.equal(assert_correct(model).loss, first.loss)


def test_a_weight_that_is_quantised_otherwise_is_refused(tmp_path: Path) -> None:
    model = compiled(tmp_path)
    oracle.step(model, oracle.batch())
    layer = frozen_weights(model)[-1].module
    layer.weight = nn.Parameter(torch.randn(64, 192), requires_grad=False)
    with pytest.raises(slx.CompileError, match="quantised anew since compile, in another way"):
        model(**oracle.batch())


@pytest.mark.parametrize("words", [slow(NF4), DOUBLE, BYTES], ids=["nf4", "double", "int8"])
def test_merge_and_unload_is_the_plain_models(tmp_path: Path, words: Any) -> None:
    model = compiled(tmp_path, words)
    twin = quantised_llama(tmp_path, words)
    oracle.step(model, oracle.batch())
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    assert not [name for name, _ in merged.named_buffers() if "sparselora" in name]
    got, wanted = merged.state_dict(), expected.state_dict()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("words", [NF4, slow(BYTES)], ids=["nf4", "int8"])
def test_adapters_and_copies_are_the_plain_models(tmp_path: Path, words: Any) -> None:
    model = compiled(tmp_path / "base", words)
    got = assert_correct(model)
    model.save_pretrained(tmp_path / "adapter")
    again = quantised_llama(tmp_path / "base", words).unload()
    resumed = PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True).train()
    slx.compile(resumed, oracle.estimator_of(model), plan=oracle.plan_of(PLAN), backend="eager")
    assert torch.equal(oracle.step(resumed, oracle.batch()).loss, got.loss)
    twin = copy.deepcopy(model)
    assert not [name for name, _ in twin.named_buffers() if "sparselora" in name]
    assert all("forward" not in module.__dict__ for module in twin.modules())
    twin.train()
    expected = quantised_llama(tmp_path / "base", words)
    assert torch.equal(twin(**oracle.batch()).loss, expected(**oracle.batch()).loss)
