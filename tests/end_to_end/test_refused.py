"""What cannot be done is said in a typed error that names it and the remedy, and changes nothing:
quantised and sharded bases, keywords of torch.compile, a batch on another device."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import sparselora_fx as slx
from sparselora_fx.model.frozen_weights import frozen_weights
from tests.support import oracle
from tests.support.quantised_stand_ins import CHANNELS, QUANTISED, WIDTH
from tests.support.tiny_models import tiny


class Net(nn.Module):
    def __init__(self, change: Callable[[nn.Linear], nn.Module] | None, both: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(False)
        if change is not None:
            self.up = change(self.up)
            self.down = change(self.down)
            self.other = change(self.other) if both else self.other
        self.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.adapter(self.down(F.silu(self.up(self.embed(input_ids))))).square().mean()


def marks(model: nn.Module) -> Any:
    return {
        name: (sorted(m.__dict__), list(m._buffers), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def estimator() -> slx.SVDEstimator:
    return slx.SVDEstimator.build(Net(None), rank=4, progress=False)


@pytest.mark.parametrize(("change", "quantiser"), QUANTISED)
def test_a_quantised_base_is_named(change: Any, quantiser: str) -> None:
    model = Net(change)
    before = marks(model)
    words = f"quantised by.*{re.escape(quantiser)}.*not supported.*quantization_config"
    with pytest.raises(slx.CompileError, match=words):
        slx.compile(model, estimator(), plan=0.5)
    with pytest.raises(slx.CompileError, match=words):
        slx.compile(model, plan=0.5)
    with pytest.raises(slx.EstimatorError, match=words):
        slx.SVDEstimator.build(model, rank=4, progress=False)
    assert marks(model) == before


@pytest.mark.parametrize(("change", "quantiser"), QUANTISED)
def test_a_base_that_is_quantised_in_part_warns_and_says_so(change: Any, quantiser: str) -> None:
    model = Net(change, both=False)
    assert [w.name for w in frozen_weights(model)] == ["other"]
    found = slx.SVDEstimator.build(model, rank=4, progress=False)
    with pytest.warns(
        UserWarning, match=f"2 of 3 frozen linears are quantised by.*{re.escape(quantiser)}"
    ):
        slx.compile(model, found, plan=0.5, backend="eager")
    table = slx.explain(model, verbose=True)
    assert table.count("dense: quantised by") == 2 and quantiser in table


def test_plain_weights_of_other_kinds_stay_plain() -> None:
    class Mine(nn.Parameter):
        pass

    def own(linear: nn.Linear) -> nn.Module:
        linear.weight = Mine(linear.weight.detach(), requires_grad=False)
        linear.register_buffer("codes", torch.zeros(3, dtype=torch.int64))
        return linear

    model = Net(own)
    assert [w.name for w in frozen_weights(model)] == ["up", "down", "other"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slx.compile(model, slx.SVDEstimator.build(model, 4, progress=False), plan=0.5)


# ---------------------------------------------------------------- sharded


def test_a_base_behind_fully_shard_is_named() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = Net(None)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        before = marks(model)
        words = r"sharded by fully_shard \(FSDP2\).*DTensors.*one process"
        with pytest.raises(slx.CompileError, match=words):
            slx.compile(model, estimator(), plan=0.5)
        with pytest.raises(slx.EstimatorError, match=words):
            slx.SVDEstimator.build(model, rank=4, progress=False)
        assert marks(model) == before
    finally:
        dist.destroy_process_group()


def test_zero_3_is_named() -> None:
    model = Net(None)
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    with pytest.raises(slx.CompileError, match=r"sharded by DeepSpeed ZeRO-3"):
        slx.compile(model, estimator(), plan=0.5)


# ---------------------------------------------------------------- keywords, devices


@pytest.mark.parametrize(
    ("keyword", "remedy"),
    [
        ("mode", "torch._inductor.config"),
        ("options", "torch._inductor.config"),
        ("fullgraph", "leave it out"),
        ("disable", "restore"),
        ("plam", "no keyword of it"),
    ],
)
def test_keywords_of_torch_compile(keyword: str, remedy: str) -> None:
    model = Net(None)
    before = marks(model)
    with pytest.raises(slx.KeywordError, match=remedy) as caught:
        slx.compile(model, estimator(), plan=0.5, **{keyword: "reduce-overhead"})
    assert isinstance(caught.value, slx.CompileError) and isinstance(caught.value, TypeError)
    assert keyword in str(caught.value) and "allowed are plan, backend" in str(caught.value)
    assert marks(model) == before


def test_the_allowed_keywords_are_those_of_compile() -> None:
    import inspect

    from sparselora_fx.user.keywords import ALLOWED

    known = inspect.signature(slx.compile).parameters.values()
    assert tuple(p.name for p in known if p.kind is p.KEYWORD_ONLY) == ALLOWED


def test_a_batch_on_another_device() -> None:
    model = tiny()
    plan = oracle.plan_of(0.5)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    data = {name: value.to("meta") for name, value in oracle.batch().items()}
    words = "Expected all tensors to be on the same device, but input_ids is on meta"
    with pytest.raises(slx.DeviceError, match=words) as caught:
        model(**data)
    assert isinstance(caught.value, RuntimeError)  # what torch raises
    with slx.record(model) as record:
        oracle.step(model, oracle.batch())
    assert len(record.sites) == 3


# ---------------------------------------------------------------- torch.func


def test_transforms_run_the_models_own_forward() -> None:
    torch.manual_seed(0)
    model = Net(None).double().train()
    held = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(0, 11, (3, 2, 5))

    def loss(values: Any, batch: Tensor) -> Tensor:
        return functional_call(model, values, (batch,))

    per_sample = vmap(grad(loss), (None, 0))
    expected = per_sample(held, ids)
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    slx.compile(model, slx.SVDEstimator.build(model, 4, progress=False), plan=plan, backend="eager")
    with pytest.warns(UserWarning, match=r"torch\.func transform.*dense"):
        got = per_sample(held, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = grad(loss)(held, ids[0])
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
        torch.testing.assert_close(again[name], gradient[0])
    with slx.record(model) as record:
        model(ids[0])
    assert set(record.sites) == {"up", "down"}


@pytest.mark.parametrize("regional", [False, True])
def test_a_failure_while_marking_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, regional: bool
) -> None:
    from sparselora_fx.model.weight_layout import GatherLayout

    def fail(*args: Any, **kwargs: Any) -> int:
        raise MemoryError("no room for another layout")

    monkeypatch.setattr(GatherLayout, "apply", fail)
    model = oracle.llama(layers=2)
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    with pytest.raises(MemoryError, match="no room"):
        slx.compile(model, oracle.estimator_of(model), plan=0.5, regional=regional)
    oracle.assert_untouched(model, before, weights)
