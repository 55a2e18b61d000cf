"""A model around its training: saving, the Trainer, compiling again, lengths, bad inputs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    options = {"plan": oracle.plan_of(oracle.mixed(model)), "backend": "eager"} | options
    return slx.compile(model, oracle.estimator_of(model), **options)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


# ---------------------------------------------------------------- the same object


def test_the_model_stays_what_it_is() -> None:
    model = oracle.llama()
    keys, parameters = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    modules = [(n, type(m)) for n, m in model.named_modules()]
    assert compiled(model) is model
    oracle.step(model, oracle.batch())
    assert isinstance(model, PeftModel) and isinstance(model.get_base_model(), LlamaForCausalLM)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == parameters
    assert [(n, type(m)) for n, m in model.named_modules()] == modules


def test_saved_adapter_loads_into_a_fresh_model(tmp_path: Path) -> None:
    model, data = oracle.llama(), oracle.batch()
    base = copy.deepcopy(model).unload()
    compiled(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(**data).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    saved = adapters(model)
    assert all((v != 0).any() for n, v in saved.items() if "lora_B" in n)
    fresh = PeftModel.from_pretrained(base, tmp_path)
    loaded = adapters(fresh)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[n], v) for n, v in saved.items())
    model.eval(), fresh.eval()
    with torch.no_grad():
        assert torch.equal(model(**data).logits, fresh(**data).logits)


def test_state_dict_round_trip_while_compiled() -> None:
    model = compiled(oracle.llama())
    weights = oracle.copy_of_weights(model)
    other = compiled(oracle.llama(seed=0))
    assert other.load_state_dict(weights, strict=True)


# ---------------------------------------------------------------- Trainer


def trainer_for(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    rows = []
    for i in range(8):
        data = oracle.batch(1, 11, padding=i % 3, seed=i)
        rows.append({name: value[0] for name, value in data.items()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.slow
def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    through = compiled(oracle.llama())
    start = adapters(through)
    trainer_for(through, tmp_path / "a").train()
    assert get_runtime(through).seen, "no compiled graph ran"
    again = compiled(oracle.llama())
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    trainer_for(again, tmp_path / "b").train(resume_from_checkpoint=checkpoint)
    finished, resumed = adapters(through), adapters(again)
    assert any(not torch.equal(finished[n], v) for n, v in start.items())
    assert finished.keys() == resumed.keys()
    assert [n for n, v in finished.items() if not torch.equal(resumed[n], v)] == []


@pytest.mark.slow
def test_restore_after_mixed_precision_training(tmp_path: Path) -> None:
    """The Trainer's bf16 wraps the forward on the instance once more."""
    model, data = oracle.llama(), oracle.batch()
    before, plain_keys = oracle.marks(model), list(model.state_dict())
    compiled(model)
    trainer = trainer_for(model, tmp_path, bf16=True, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    with slx.record(model) as record:
        oracle.step(model, data)
    assert set(record.sites)
    slx.restore(model)
    assert list(model.state_dict()) == plain_keys
    for name, module in model.named_modules():
        assert list(module._buffers) == before[name][2], name
        assert not module._forward_pre_hooks or name == "", name
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.restore(model)
    twin = oracle.llama()
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**data).logits.float(), twin(**data).logits.float())


@pytest.mark.slow
def test_compile_again_after_mixed_precision_training(tmp_path: Path) -> None:
    """A forward that was wrapped since must not bring the old plan back."""
    model, data = compiled(oracle.llama()), oracle.batch()
    trainer_for(model, tmp_path, bf16=True, save_strategy="no").train()
    compiled(model, plan=oracle.plan_of({"layers.0.mlp": 0.5}))
    with slx.record(model) as record:
        oracle.step(model, data)
    assert [(k, {c: len(v) for c, v in s.items()}) for k, s in record.selections.items()] == [
        ("base_model.model.model.layers.0.mlp", {"ffn": 56})
    ]
    slx.restore(model)


@pytest.mark.slow
def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    model = compiled(oracle.llama(layers=2))
    options = {"gradient_checkpointing": True}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    start = adapters(model)
    trainer_for(model, tmp_path, save_strategy="no", **options).train()
    assert any(not torch.equal(adapters(model)[n], v) for n, v in start.items())
    assert len(get_runtime(model).seen) == 14


# ---------------------------------------------------------------- compiling again, batches


def test_compiling_again_replaces() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    compiled(model)
    oracle.step(model, data)
    compiled(model, plan=oracle.plan_of({"layers.0.mlp": 0.5}))
    with slx.record(model) as record:
        got = oracle.step(model, data)
    assert list(record.selections) == ["base_model.model.model.layers.0.mlp"]
    slx.restore(model)
    oracle.assert_untouched(model, before, weights)
    oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


def wrapped_again(base: nn.Module) -> nn.Module:
    return oracle.randomise(get_peft_model(base, oracle.lora_config())).to(torch.float64).train()


def test_another_model_on_the_same_base_replaces() -> None:
    """A second adapter beside the first: the first one is restored."""
    first, data = wrapped_again(oracle.llama(dtype=torch.float64).unload()), oracle.batch()
    compiled(first)
    oracle.step(first, data)
    model = wrapped_again(first.get_base_model())
    with pytest.warns(UserWarning, match="shares frozen linears"):
        compiled(model)
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.explain(first, verbose=True)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    assert len(record.sites) == 7
    slx.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


@pytest.mark.slow
def test_two_compiled_models_do_not_meet() -> None:
    data = oracle.batch()
    first, second = (oracle.llama(seed=s, dtype=torch.float64) for s in (0, 1))
    compiled(first), compiled(second, plan=oracle.plan_of(0.5))
    for model in (first, second):
        with slx.record(model) as record:
            got = oracle.step(model, data)
        slx.restore(model)
        oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


def test_compiled_once_more_by_the_user() -> None:
    """`torch.compile` around a compiled model (the Trainer's ``torch_compile``) stays sliced."""
    model, data = compiled(oracle.llama(dtype=torch.float64)), oracle.batch()
    outer = torch.compile(model, backend="eager")
    with slx.record(model) as record:
        got = oracle.step(outer, data)
    assert len(record.sites) == 7
    slx.restore(model)
    expected = oracle.reference_step(model, data, record)
    got.gradients = {n.removeprefix("_orig_mod."): g for n, g in got.gradients.items()}
    oracle.assert_close(got, expected, 1e-9)


@pytest.mark.slow
def test_batch_lengths_recompile_little() -> None:
    model = compiled(oracle.llama(dtype=torch.float64), backend="eager")
    counts = []
    for length in range(9, 29):
        oracle.step(model, oracle.batch(2, length, seed=length))
        counts.append(get_runtime(model).graphs)
    assert counts[1] - counts[0] <= 1, counts
    assert counts[-1] - counts[0] <= 2, counts
    data = oracle.batch(2, 33)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    slx.restore(model)
    oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


@pytest.mark.slow
def test_batch_lengths_recompile_little_behind_autograd() -> None:
    model = compiled(oracle.llama(), backend="aot_eager")
    counts = []
    for length in (9, 14, 11):
        oracle.step(model, oracle.batch(2, length, seed=length))
        counts.append(get_runtime(model).graphs)
    assert counts[2] - counts[0] <= 1, counts


def test_selection_depends_on_the_batch() -> None:
    model = compiled(oracle.llama())
    recorded = []
    for seed in (1, 2):
        with slx.record(model) as record:
            oracle.step(model, oracle.batch(seed=seed))
        recorded.append(record.selections)
    first, second = recorded
    for region, choices in first.items():
        for choice, rows in choices.items():
            assert not torch.equal(rows, second[region][choice]), (region, choice)
            assert rows.dtype == torch.int64
            assert torch.equal(rows, rows.unique()), "not ascending and unique"


def test_recording_is_over_after_the_block() -> None:
    model = compiled(tiny())
    with slx.record(model) as record:
        oracle.step(model, oracle.batch(seed=1))
    kept = {name: rows.clone() for name, (_, rows) in record.sites.items()}
    oracle.step(model, oracle.batch(seed=2))
    assert all(torch.equal(record.sites[name][1], rows) for name, rows in kept.items())


def test_nested_records_see_all_of_their_calls() -> None:
    model, data = compiled(tiny()), oracle.batch()
    with slx.record(model) as outer:
        with slx.record(model) as inner:
            oracle.step(model, data)
        assert len(outer.sites) == len(inner.sites) == 3
        oracle.step(model, oracle.batch(seed=2))
    assert any(
        not torch.equal(rows, inner.sites[name][1]) for name, (_, rows) in outer.sites.items()
    )


def test_names_survive_replaced_parameters() -> None:
    """`load_state_dict(assign=True)` puts other parameter objects in the place of the old ones."""
    model, data = compiled(oracle.llama(dtype=torch.float64)), oracle.batch()
    oracle.step(model, data)
    model.load_state_dict(oracle.copy_of_weights(model), assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with slx.record(model) as record:
        got = oracle.step(model, data)
    assert len(record.sites) == 7
    slx.restore(model)
    oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


# ---------------------------------------------------------------- bad inputs


def refused(
    model: nn.Module, error: type[Exception], words: str, *args: Any, **options: Any
) -> None:
    """The call fails with a typed error that says these words, and the model is as it was."""
    before = oracle.marks(model)
    weights = {n: v for n, v in oracle.copy_of_weights(model).items() if not v.is_meta}
    with pytest.raises(error, match=words):
        slx.compile(model, *args, **options)
    state = {n: v for n, v in model.state_dict().items() if not v.is_meta}
    assert oracle.marks(model) == before
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[n], v) for n, v in weights.items())


def test_estimator_of_another_model() -> None:
    model, other = oracle.llama(), oracle.llama(seed=1)
    refused(model, slx.EstimatorError, "build", oracle.estimator_of(other), plan=0.5)
    refused(
        model, slx.EstimatorError, "build", oracle.estimator_of(oracle.llama(hidden=36)), plan=0.5
    )


def test_something_else_than_an_estimator() -> None:
    """(None is allowed: the dense first steps then make one.)"""
    words = "got str; build one with sparselora_fx.SVDEstimator.build"
    refused(oracle.llama(), slx.CompileError, words, "factors.safetensors", plan=0.5)


def test_meta_device() -> None:
    model = oracle.llama()
    estimator = oracle.estimator_of(model)
    refused(
        model.to("meta"), slx.CompileError, "meta device.*load real weights", estimator, plan=0.5
    )


def test_nothing_frozen() -> None:
    model = oracle.llama()
    estimator = oracle.estimator_of(model)
    model.requires_grad_(True)
    refused(model, slx.CompileError, "no frozen linear.*requires_grad=False", estimator, plan=0.5)


def test_unknown_layer() -> None:
    model = oracle.llama()
    estimator = oracle.estimator_of(model)
    refused(model, slx.PlanError, "layers.0.mlp", estimator, plan={"layers.0.mpl": 0.5})
    refused(model, slx.PlanError, "layers.9.mlp", estimator, plan={"layers.9.mlp": 0.5})


def test_channel_multiple_too_large() -> None:
    model = oracle.llama()
    plan = oracle.plan_of(0.5, 4096)
    refused(model, slx.PlanError, "channel_multiple=4096", oracle.estimator_of(model), plan=plan)


@pytest.mark.parametrize(
    "plan", [1.0, -0.1, float("nan"), {"layers.0.mlp": 1}, "no_such_file.yaml"]
)
def test_plan_out_of_range(plan: Any) -> None:
    model = oracle.llama()
    refused(model, slx.PlanError, ".", oracle.estimator_of(model), plan=plan)


@pytest.mark.parametrize(
    ("option", "word", "allowed"),
    [
        ("backend", "indutcor", "'inductor', 'aot_eager', 'eager'"),
        ("backend", None, "'inductor'"),
        ("lora_branch", "spares", "'dense' or 'sparse'"),
    ],
)
def test_unknown_word(option: str, word: Any, allowed: str) -> None:
    model = oracle.llama()
    refused(
        model, slx.CompileError, allowed, oracle.estimator_of(model), plan=0.5, **{option: word}
    )


def test_unknown_token_policy() -> None:
    with pytest.raises(slx.PlanError, match="did you mean 'context'"):
        slx.SparsityPlan(0.5, tokens="contxt")


def test_no_module() -> None:
    with pytest.raises(slx.CompileError, match=r"torch\.nn\.Module"):
        slx.compile("model", None)


@pytest.mark.parametrize("call", [slx.explain, slx.restore, lambda m: slx.record(m).__enter__()])
def test_calls_before_compile(call: Any) -> None:
    model = oracle.llama()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    with pytest.raises(slx.CompileError, match="compile"):
        call(model)
    oracle.assert_untouched(model, before, weights)


def test_a_refused_second_compile_leaves_the_first() -> None:
    model, data = compiled(tiny()), oracle.batch()
    estimator = oracle.estimator_of(model)
    expected = oracle.step(model, data)
    refused(model, slx.PlanError, "layers", estimator, plan={"layers.7.mlp": 0.5})
    oracle.assert_identical(oracle.step(model, data), expected)


def test_explain_before_a_step_tells_the_plan() -> None:
    table = slx.explain(compiled(oracle.llama()), verbose=True)
    assert "not traced yet" in table and "0 of 7 frozen linears rewritten" in table


def test_default_plan_and_options() -> None:
    """`compile(model, estimator)` alone works; four layers: the first and the last stay dense."""
    model = oracle.llama(layers=4)
    slx.compile(model, oracle.estimator_of(model))
    table = slx.explain(model, verbose=True)
    assert table.count("sparsity 0") == 14 and table.count("not traced yet") == 14
