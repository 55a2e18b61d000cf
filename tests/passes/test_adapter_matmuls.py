"""LoRA matmuls of a rewritten graph: down-projections joined, up-projections turned or batched,
nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx import environment
from sparselora_fx.compiler import backend
from tests.support import oracle
from tests.support.adapted_nets import WIDTH, Adapted
from tests.support.rewritten_graphs import count, rewritten
from tests.support.token_batches import ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_down_projections_on_one_input_are_one_matmul(
    monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    model = oracle.llama(
        layers=1, targets=oracle.ATTENTION_TARGETS, dropout=dropout, dtype=torch.float64
    )
    joint, report = rewritten(monkeypatch, model, ragged(), PLAN)
    assert report.counts["join_adapters"] == (0 if dropout else 3)
    factors = report.counts["join_factors"]  # of q, k and v, and of gate and up
    assert factors == 5 and count(joint, torch.narrow) == factors + (0 if dropout else 3)


def test_up_projections_of_keys_and_values_are_one_batch_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    expected = oracle.run_compiled(model, ragged(), PLAN, backend="aot_eager")
    monkeypatch.setattr(environment, "shares_launches", lambda device: True)
    got = oracle.run_compiled(model, ragged(), PLAN, backend="aot_eager")
    oracle.assert_close(got, expected, 2e-6)
    joint, report = rewritten(monkeypatch, model, ragged(), PLAN)
    assert report.counts["batch_adapters"] == 2 and count(joint, torch.bmm) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "branch"), [("all", "dense"), ("context", "sparse")]
)  # two stand for what small graphs hold of each pass
def test_nothing_changes(monkeypatch: pytest.MonkeyPatch, tokens: str, branch: str) -> None:
    model = oracle.llama(layers=2, dtype=torch.float64)
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    joint = oracle.run_compiled(model, ragged(), plan, lora_branch=branch)
    without = tuple(p for p in backend.PIPELINE if not p.__name__.endswith("_adapters"))
    assert len(without) == len(backend.PIPELINE) - 3
    monkeypatch.setattr(backend, "PIPELINE", without)
    # transformers normalises in fp32, so a last-place difference is worth 1e-7 of that.
    oracle.assert_close(joint, oracle.run_compiled(model, ragged(), plan, lora_branch=branch), 2e-6)


class Gated(nn.Module):
    """A gated FFN whose down-projections are 8 times narrower than its input."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.gate, self.up = Adapted(WIDTH, 40), Adapted(WIDTH, 40)
        self.out = Adapted(40, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.between is not None:
            gate, x = self.between(gate, x)
        return self.out(F.silu(gate) * self.up(x)).square().sum()


def _write(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone()
    x.mul_(0.5)
    return gate, x


def _cut(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return gate.detach(), x


def _cut_quietly(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        gate = gate * 2
    return gate, x


@pytest.mark.parametrize(
    ("between", "joined"), [(None, 2), (_write, 0), (_cut, 0), (_cut_quietly, 0)]
)
def test_what_may_not_be_joined_is_not(
    monkeypatch: pytest.MonkeyPatch, between: Any, joined: int
) -> None:
    torch.manual_seed(0)
    model = Gated(between).double().train()
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    found: list[Any] = []
    run = backend.run

    def spy(gm: Any, *args: Any) -> Any:
        found.append(run(gm, *args))
        return found[-1]

    monkeypatch.setattr(backend, "run", spy)
    slx.compile(model, oracle.estimator_of(model, 3), plan=oracle.plan_of(0.5), backend="aot_eager")
    with slx.record(model) as record:
        model(x.clone()).backward()
    slx.restore(model)
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum(report.counts["join_adapters"] for report in found) == joined
    model.zero_grad(set_to_none=True)
    with oracle.masked_reference(model, record):
        model(x.clone()).backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert (got[name] is None) == (p.grad is None), name
        if p.grad is not None:
            assert oracle.difference(got[name], p.grad) <= 1e-9, name


def test_an_up_projection_trains_through_the_narrow_side() -> None:
    """dB is made by a matmul of r rows, not of r columns."""
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="aot_eager")
    data = ragged()
    oracle.step(model, data)
    with torch.profiler.profile(record_shapes=True) as profile:
        oracle.step(model, data)
    slx.restore(model)
    tokens = data["input_ids"].numel()
    shapes = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    assert [[4, tokens], [tokens, 48]] in shapes
    assert [[48, tokens], [tokens, 4]] not in shapes
    assert [[16, tokens], [tokens, 4]] not in shapes
