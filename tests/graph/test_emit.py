"""What passes make carries the value that its op has on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparselora_fx as slx
from sparselora_fx.compiler import backend, spec
from sparselora_fx.graph.emit import mode_in, unwatch, watch
from sparselora_fx.rewrite.rewrite import Options, Rewrite
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


def test_sizes_stay_symbolic_and_no_guard_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic: list[bool] = []

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        shapes = mode_in(gm.graph).shape_env
        before, traced = len(shapes.guards), set(gm.graph.nodes)
        report = run(gm, *args)
        new = [n for n in gm.graph.nodes if n not in traced and n.op != "output"]
        values = [t for n in new for t in tree_leaves(n.meta["example_value"])]
        sizes = [size for t in values if isinstance(t, Tensor) for size in t.shape]
        symbolic.append(any(isinstance(size, torch.SymInt) for size in sizes))
        assert len(shapes.guards) == before
        return report

    run = backend.run
    monkeypatch.setattr(backend, "run", spy)
    model = FeedForward()
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    estimator = slx.SVDEstimator.build(model, rank=2, progress=False)
    slx.compile(model, estimator, plan=plan, backend="eager", dynamic=True)
    model(torch.randn(2, 3, 8)).sum().backward()
    assert symbolic == [True]


def test_a_node_is_made_in_the_autocast_of_its_place() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(3, 4)
    enter = graph.call_function(_enter_autocast, ("cpu", torch.bfloat16, True, None))
    leave = graph.call_function(_exit_autocast, (enter,))
    graph.output((x,))
    gm = fx.GraphModule({}, graph)
    watch(gm)
    made = {}
    for name, place in {"before": enter, "inside": leave, "after": leave.next}.items():
        with gm.graph.inserting_before(place):
            made[name] = gm.graph.call_function(torch.mm, (x, gm.graph.call_method("t", (x,))))
    dtypes = {name: node.meta["example_value"].dtype for name, node in made.items()}
    assert dtypes == {"before": torch.float32, "inside": torch.bfloat16, "after": torch.float32}
    unwatch(gm)
    with gm.graph.inserting_before(enter):
        assert "example_value" not in gm.graph.call_method("t", (x,)).meta


def test_a_pass_whose_nodes_have_no_value_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(3, 4)
    graph.output((x,))
    rewrite = Rewrite(fx.GraphModule({}, graph), Options())
    with rewrite.graph.inserting_after(x):
        made = rewrite.graph.call_method("t", (x,))
    spec.check(rewrite, "turn")
    made.meta.clear()
    with pytest.raises(AssertionError, match=r"after turn: \['t'\] have no value"):
        spec.check(rewrite, "turn")
