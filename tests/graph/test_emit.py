"""What passes make carries the value that its op has on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparselora_fx as slx
from sparselora_fx.compiler import backend
from tests.support.ffn_example import FeedForward


class Checkpointed(nn.Module):
    """A block that runs again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("model", [FeedForward, Checkpointed])
def test_every_call_has_a_real_value(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the graph that is compiled and in its bodies: AOTAutograd's cache refuses a graph in which
    it is not known what a method is called on."""
    graphs: list[fx.GraphModule] = []

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        report = run(gm, *args)
        assert report is not None and report.regions
        graphs.extend(m for m in gm.modules() if isinstance(m, fx.GraphModule))
        return report

    run = backend.run
    monkeypatch.setattr(backend, "run", spy)
    trained = model()
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    estimator = slx.SVDEstimator.build(trained, rank=2, progress=False)
    slx.compile(trained, estimator, plan=plan, backend="eager")
    trained(torch.randn(2, 3, 8)).sum().backward()
    calls = [n for g in graphs for n in g.graph.nodes if n.op in ("call_function", "call_method")]
    assert len(calls) > 20 and len(graphs) == (2 if model is Checkpointed else 1)
    for node in calls:
        held = [t for t in tree_leaves(node.meta["example_value"]) if isinstance(t, Tensor)]
        assert held and all(isinstance(t, FakeTensor) for t in held), node.format_node()


def test_hooks_of_the_users_see_no_fake_tensor() -> None:
    seen: list[Tensor] = []

    def pack(held: Tensor) -> Tensor:
        seen.append(held)
        return held

    model = FeedForward()
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    estimator = slx.SVDEstimator.build(model, rank=2, progress=False)
    slx.compile(model, estimator, plan=plan, backend="eager")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
        model(torch.randn(2, 3, 8)).sum().backward()
    assert seen and not any(isinstance(held, FakeTensor) for held in seen)
