"""Gathers of one value are one gather, and what they are moved past is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import sparselora_fx as slx
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.lowering import inductor_backend
from tests.support.ffn_example import FeedForward, graphs


def test_two_readers_of_a_choice_share_what_they_read() -> None:
    """LoRA on up and down: the base and the adapter of down read the same kept channels."""
    _, after = graphs()
    lines = [line.partition(" = ")[2] for line in after.splitlines()]
    assert len(lines) > 20
    hidden = [line for line in lines if line.startswith("silu(") or "up.B" in line]
    # Of the three, one silu is the predictor's.
    assert sum(line.startswith("silu(") for line in hidden) == 2
    assert sum("sliced_linear(" in line for line in hidden) == 1, after


def test_their_gradient_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward has one gradient of up's LoRA-B, and one to what it reads."""
    found: dict[str, list[str]] = {"forward": [], "backward": []}

    def keeping(name: str) -> Any:
        def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
            found[name] += [op_name(node) for node in gm.graph.nodes]
            return make_boxed_func(gm.forward)

        return compiler

    def compiled(name: str, gm: fx.GraphModule, inputs: Any, *, rewritten: bool) -> Any:
        assert rewritten
        aot = aot_autograd(fw_compiler=keeping("forward"), bw_compiler=keeping("backward"))
        return aot(gm, inputs)

    monkeypatch.setattr(inductor_backend, "backend_compile", compiled)
    torch.manual_seed(0)
    model = FeedForward()
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    estimator = slx.SVDEstimator.build(model, rank=2, progress=False)
    slx.compile(model, estimator, plan=plan, backend="aot_eager")
    model(torch.randn(2, 3, 8, requires_grad=True)).sum().backward()
    forward, backward = found["forward"], found["backward"]
    assert forward.count("sliced_linear") == 3  # gate, up, up's LoRA-B
    assert forward.count("sliced_linear_in") == 2  # down, down's LoRA-A
    assert backward.count("sliced_linear_wgrad") == 1
    assert backward.count("sliced_linear_dgrad") == 3
    assert backward.count("sliced_linear_in_dgrad") == 2
    assert backward.count("sliced_linear_in_wgrad") == 1
