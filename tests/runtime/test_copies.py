"""Copies and pickles of a compiled model are plain and the compiled one stays; merging ends it."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.slow import slow


def compiled(model: nn.Module, backend: str = "eager", **options: Any) -> nn.Module:
    options = {"plan": oracle.plan_of(oracle.mixed(model))} | options
    return slx.compile(model, oracle.estimator_of(model), backend=backend, **options)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def ours(model: nn.Module) -> list[str]:
    """Whatever hangs on a model's modules and could be ours."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}: {key}" for key in module.__dict__ if "sparselora" in key]
        found += [f"{name}: {key}" for key in module._buffers if "sparselora" in key]
        found += [
            f"{name}: {key}" for key in ("forward", "__reduce_ex__") if key in module.__dict__
        ]
        found += [f"{name}: a hook" for _ in module._forward_pre_hooks]
        found += [f"{name}: {key}" for key in module._non_persistent_buffers_set if "sp" in key]
        found += [f"{name}: {key}" for key in module.__dict__ if "unload" in key]
    return found


def with_buffers(model: nn.Module) -> nn.Module:
    """Something of the user's own beside ours: a hook and buffers."""
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.register_buffer("theirs", torch.ones(2), persistent=False)
    layer.register_forward_pre_hook(seen_by_user)
    return model


def seen_by_user(module: nn.Module, args: Any) -> None:
    module.__dict__["calls"] = module.__dict__.get("calls", 0) + 1


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (copy.deepcopy, {}),
        slow(saved, {}),
        slow(pickled, {}),
        (copy.deepcopy, {"regional": True}),
        (pickled, {"trim_logits": True}),
    ],
)
def test_a_copy_is_plain_and_the_compiled_model_stays(
    make: Callable[[nn.Module], nn.Module], options: Any
) -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    plain = copy.deepcopy(model)
    before = oracle.marks(plain)
    compiled(model, **options)
    first = oracle.step(model, data)
    other = make(model)
    assert ours(other) == []
    marks, before = oracle.marks(other), dict(before)
    marks.pop("forward"), before.pop("forward")
    for found in (marks, before):  # hooks' dictionaries hold no hook of ours
        assert found.keys() == before.keys()
    assert marks == before
    assert other.forward.__self__ is other
    oracle.assert_identical(oracle.step(other, data), oracle.step(plain, data))
    again = oracle.step(model, data)
    oracle.assert_identical(again, first)
    assert "rewritten" in slx.explain(model, verbose=True)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", [copy.deepcopy, saved, pickled])
def test_a_copy_keeps_what_is_the_users(make: Callable[[nn.Module], nn.Module]) -> None:
    model = with_buffers(oracle.llama())
    other = make(compiled(model))
    layer = other.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert list(layer._forward_pre_hooks.values()) == [seen_by_user]
    assert torch.equal(layer.theirs, torch.ones(2))
    assert layer._non_persistent_buffers_set == {"theirs"}


def test_compiling_a_copy_of_the_base_leaves_the_original(recwarn: pytest.WarningsRecorder) -> None:
    model, data = compiled(oracle.llama(dtype=torch.float64)), oracle.batch()
    first = oracle.step(model, data)
    teacher = copy.deepcopy(model.get_base_model())
    assert ours(teacher) == []
    compiled(teacher)
    assert not [w for w in recwarn if "shares frozen linears" in str(w.message)]
    oracle.assert_identical(oracle.step(model, data), first)
    with slx.record(model) as one, slx.record(teacher) as two:
        teacher(**data).loss.backward()
    assert not one.sites and two.sites
    slx.restore(teacher)
    assert "rewritten" in slx.explain(model, verbose=True)


def test_hooks_in_a_copy_by_other_means_do_not_count() -> None:
    """A class that copies itself may take our hooks along."""

    class Copied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Copied":
            new = type(self)(self.in_features, self.out_features, bias=False)
            new.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "__reduce_ex__"}
            new.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            return new

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Copied(16, 32, bias=False), Copied(32, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x))).square().mean()

    first = Net().requires_grad_(False)
    second = copy.deepcopy(compiled(first, plan=0.5))
    compiled(second, plan=0.5)
    assert "2 of 2" not in slx.explain(first, verbose=True)  # still compiled: no error


def test_a_shallow_copy_runs_dense() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    plain = oracle.step(copy.deepcopy(model), data)
    compiled(model)
    shallow = copy.copy(model)
    with slx.record(model) as record:
        oracle.assert_identical(oracle.step(shallow, data), plain)
    assert record.sites == {}


@pytest.mark.slow
def test_a_pickle_needs_none_of_our_code(tmp_path: Path) -> None:
    model = compiled(oracle.llama()).get_base_model()
    wrapped = compiled(oracle.llama())
    for net in (model, wrapped):
        assert b"sparselora" not in pickle.dumps(net)
    torch.save(wrapped, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['sparselora_fx'] = None; import torch;"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "m(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------- other wrappers


@pytest.mark.slow
def test_a_wrapped_forward_is_not_copied_silently() -> None:
    """Accelerate's mixed precision: a copy would call the model it was copied from."""
    from accelerate import Accelerator

    model, data = oracle.llama(), oracle.batch()
    compiled(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    with slx.record(model) as record:
        oracle.step(prepared, data)
    assert record.sites
    seen, graphs = slx.explain(prepared), get_runtime(model).graphs
    assert slx.explain(prepared, data).regions == seen.regions and seen.regions
    assert "slice_sites" in str(slx.graphs(prepared, data)) and get_runtime(model).graphs == graphs
    with pytest.raises(slx.CompileError, match="unwrap_model"):
        copy.deepcopy(prepared)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    with slx.record(model) as record:
        oracle.step(model, data)
    assert record.sites
    assert ours(copy.deepcopy(model)) == []
    slx.restore(model)
    assert not [found for found in ours(model) if "forward" not in found]
    copy.deepcopy(model)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(
    ("how", "ran", "options"),
    [
        ("merge_and_unload", True, {}),
        ("unload", False, {}),
        ("merge_and_unload", False, {"regional": True}),
    ],
)
def test_merging_leaves_nothing_behind(how: str, ran: bool, options: Any) -> None:
    model, data = oracle.llama(), oracle.batch()
    plain = getattr(copy.deepcopy(model), how)()
    keys = oracle.marks(plain)
    compiled(model, **options)
    if ran:
        oracle.step(model, data)
    merged = getattr(model, how)()
    assert ours(merged) == [] and ours(model) == []
    marks = oracle.marks(merged)
    marks.pop("forward"), keys.pop("forward")
    assert marks == keys
    for name, value in plain.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.explain(model, verbose=True)
    assert b"sparselora" not in pickle.dumps(merged)
    with torch.no_grad():
        assert torch.equal(merged.eval()(**data).logits, plain.eval()(**data).logits)


def test_a_failed_merge_leaves_the_model_compiled() -> None:
    model, data = compiled(oracle.llama()), oracle.batch()
    with pytest.raises(TypeError, match="nothing"):
        model.merge_and_unload(nothing="such")
    with slx.record(model) as record:
        oracle.step(model, data)
    assert len(record.sites) == 7
    held = model.merge_and_unload
    slx.restore(model)
    held()  # restored already: it merges, and undoes nothing twice


# ---------------------------------------------------------------- adapters that change


@pytest.mark.slow
def test_adapters_added_switched_and_deleted_stay_right() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    compiled(model)
    oracle.step(model, data)
    model.add_adapter("second", oracle.lora_config())
    model.to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.05)
    for act in (
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("second"),
    ):
        act()
        with slx.record(model) as record:
            got = oracle.step(model, data)
        assert len(record.sites) == 7
        expected = oracle.reference_step(copy.deepcopy(model), data, record)
        oracle.assert_close(got, expected, 1e-9)
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        base = model(**data).logits
    twin = copy.deepcopy(model).unload().eval()
    with torch.no_grad():
        assert torch.equal(base, twin(**data).logits)
