"""Compiling ahead: no graph is compiled at a switch, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.trainers import _trainer

RAMP = [(2, 0.5), (4, 1.0)]


def compiled(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = oracle.llama(layers=2, dropout=0.1) if model is None else model
    plan = slx.SparsityPlan(0.5, channel_multiple=1, tokens="all", start_step=0, ramp=RAMP)
    options = {"plan": plan, "backend": "aot_eager"} | options
    return slx.compile(model, oracle.estimator_of(model), **options)


def train(model: nn.Module, steps: int = 6, lengths: tuple[int, ...] = (13,)) -> list[int]:
    """AdamW over the whole ramp; how many graphs there are after each step."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    graphs = []
    for n in range(steps):
        slx.step(model, n, steps)
        model(**oracle.batch(length=lengths[n % len(lengths)], seed=n)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        graphs.append(get_runtime(model).graphs)
    return graphs


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_every_level_compiles_in_the_first_step_and_results_are_bit_equal(regional: bool) -> None:
    """Dense and two levels; by blocks, a dense one for the first block, too."""
    late = compiled(regional=regional)
    graphs = train(late)
    assert graphs[0] < graphs[2] < graphs[4], "nothing would stall: the test shows nothing"
    torch.compiler.reset()
    early = compiled(regional=regional, precompile=True)
    assert train(early) == [4 if regional else 3] * 6
    got, expected = adapters(early), adapters(late)
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


@pytest.mark.slow
def test_other_lengths_are_compiled_ahead_too() -> None:
    """The second length makes sizes dynamic in the dense phase; the switch is ready by then."""
    model = compiled(precompile=True, plan=slx.SparsityPlan(
        0.5, channel_multiple=1, tokens="all", start_step=4))  # fmt: skip
    graphs = train(model, 9, (13, 17, 11))
    assert graphs[3:] == [4] * 6, graphs


@pytest.mark.slow
def test_warm_up_leaves_no_trace() -> None:
    model, data = compiled(), oracle.batch()
    model.eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 2.0)
    weights, state = oracle.copy_of_weights(model), torch.get_rng_state()
    slx.step(model, 0, 6)
    with slx.record(model) as record, torch.no_grad():
        assert slx.warm_up(model, data) == 3
        assert slx.warm_up(model, data) == 0
    assert record.sites == {} and get_runtime(model).sparsity_scale() == 0.0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 2).all() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    model.train()
    assert train(model) == [3] * 6


@pytest.mark.slow
def test_an_undriven_schedule_has_one_level() -> None:
    model = compiled()
    assert slx.warm_up(model, oracle.batch()) == 1


class Net(nn.Module):
    """A frozen feed-forward between a batch norm and a trained head; returns a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 1)
        for frozen in (self.up, self.down):
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.norm(x)))))


def test_buffers_are_put_back() -> None:
    torch.manual_seed(0)
    model = compiled(Net(), precompile=True)
    slx.step(model, 3, 6)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert slx.warm_up(model, {"x": torch.randn(16, 8)}) == 3
    assert int(model.norm.num_batches_tracked) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    out = model(torch.randn(16, 8))
    assert int(model.norm.num_batches_tracked) == 1 and out.requires_grad
    assert get_runtime(model).graphs == 3


@pytest.mark.slow
def test_a_failing_batch_leaves_the_schedule_as_it_was() -> None:
    model = compiled()
    slx.step(model, 0, 6)
    with pytest.raises(Exception, match=r".*"):
        slx.warm_up(model, {**oracle.batch(), "attention_mask": torch.ones(5, 5)})
    assert get_runtime(model).call.is_step and get_runtime(model).sparsity_scale() == 0.0


def test_an_uncompiled_model_is_refused() -> None:
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.warm_up(oracle.llama(), oracle.batch())


class Count(TrainerCallback):
    """Notes how many graphs there are after every optimizer step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.graphs.append(get_runtime(kwargs["model"]).graphs)


@pytest.mark.slow
def test_the_trainer_switches_without_compiling(tmp_path: Path) -> None:
    count, trainer = Count(), _trainer(compiled(precompile=True), tmp_path)
    trainer.add_callback(count)
    trainer.train()
    assert count.graphs == [3] * 6
