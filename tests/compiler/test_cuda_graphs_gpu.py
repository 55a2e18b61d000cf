"""CUDA graphs on a GPU: replayed steps are the steps that would have run (marked gpu)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.replayed_steps import PLAN, batches, graphs_of

pytestmark = pytest.mark.gpu
TOLERANCE = {False: 1e-4, True: 3e-2}  # of loss and gradients; with autocast in bf16


def model_of(graphs: bool, *, dropout: float = 0.0, plan: Any = PLAN, **options: Any) -> nn.Module:
    model = oracle.llama(layers=2, dropout=dropout).cuda()
    checkpointing = options.pop("checkpointing", False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    estimator = oracle.estimator_of(model)
    options.setdefault("verify_speed", False)  # all sparse steps are compared
    return slx.compile(model, estimator, plan=plan, cuda_graphs=graphs, **options)


def backward(model: nn.Module, data: dict[str, Any], seed: int, autocast: bool) -> torch.Tensor:
    torch.manual_seed(seed)
    context = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        loss = model(**data).loss
    (loss / 2).backward()
    return loss.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    "options", [{}, {"trim_logits": True}, {"checkpointing": True}, {"dropout": 0.1}], ids=str
)
def test_replayed_steps_are_the_same_steps(options: dict[str, Any], autocast: bool) -> None:
    """Two batches to a step, an optimizer, evaluation in between, dense steps first."""
    plan = slx.SparsityPlan(0.5, start_step=4, channel_multiple=1)
    models = [model_of(graphs, plan=plan, **options) for graphs in (True, False)]
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models
    ]
    for i, data in enumerate(batches(18, device="cuda")):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            slx.step(model, i // 2, 9)
            losses.append(backward(model, data, i, autocast))
            if i % 2 == 0:
                continue
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()(**data)
            model.train()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=TOLERANCE[autocast])
        if i % 2 == 0:
            compare(models, TOLERANCE[autocast])
    graphs = graphs_of(models[0])
    assert graphs.captures == 2 and graphs.pool.forwards >= 8, graphs.describe()


def compare(models: list[nn.Module], bound: float) -> None:
    first, second = (dict(model.named_parameters()) for model in models)
    compared = 0
    for name, parameter in first.items():
        if parameter.grad is not None:
            assert oracle.difference(parameter.grad, second[name].grad) <= 10 * bound, name
            compared += 1
    assert compared


def test_dropout_differs_from_step_to_step_and_follows_the_seed() -> None:
    model = model_of(True, dropout=0.3)
    data = next(batches(1, device="cuda"))
    for i in range(7):
        backward(model, data, i, False)
    assert graphs_of(model).captures == 1
    torch.manual_seed(0)
    drawn = [model(**data).loss.item() for _ in range(4)]
    assert len(set(drawn)) == 4
    assert backward(model, data, 7, False) == backward(model, data, 7, False)


def test_dropout_within_checkpointing_is_replayed_or_says_why_not() -> None:
    model = model_of(True, dropout=0.1, checkpointing=True)
    data = next(batches(1, device="cuda"))
    for i in range(7):
        assert torch.isfinite(backward(model, data, i, False))
    graphs = graphs_of(model)
    assert graphs.captures == 1 or graphs.reason


def test_a_replayed_step_waits_for_nothing_and_copies_no_weight() -> None:
    model = model_of(True)
    data = {
        name: value.to("cuda") for name, value in slx.count_tokens(model, next(batches(1))).items()
    }
    for i in range(7):
        backward(model, dict(data), i, False)
    assert graphs_of(model).captures == 1
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**data).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert torch.cuda.memory_allocated() - before <= 2 * gradients
