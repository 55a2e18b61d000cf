"""Gathers of one value are one gather, and what they are moved past is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import sparselora_fx as slx
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.lowering import inductor_backend
from sparselora_fx.passes.hoist_channel_gathers import hoist_channel_gathers
from sparselora_fx.passes.hoist_token_gathers import hoist_token_gathers
from tests.support.ffn_example import FeedForward, graphs
from tests.support.gathered_graphs import Lists, Selected
from tests.support.small_graphs import Pass, changes_nothing, keeps_values, text


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


Kind = tuple[type[Selected] | type[Lists], Pass]
KINDS: dict[str, Kind] = {
    "channels": (Selected, hoist_channel_gathers),
    "tokens": (Lists, hoist_token_gathers),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_the_mask_it_would_have_drawn(kind: str) -> None:
    of, hoist = KINDS[kind]
    small = of()
    rewrite = small.rewrite(small.gather(small.call(F.dropout, small.x, 0.3)))
    assert keeps_values(rewrite, hoist, **small.given) == 1
    assert "new_ones" in text(rewrite) and "mul" in text(rewrite)
    changes_nothing(rewrite, hoist)


@pytest.mark.parametrize("kind", KINDS)
def test_another_reader_holds_a_gather_back(kind: str) -> None:
    of, hoist = KINDS[kind]
    small = of()
    h = small.call(F.silu, small.x)
    changes_nothing(small.rewrite(small.gather(h), h), hoist)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_in_place_is_read_where_it_was(kind: str) -> None:
    of, hoist = KINDS[kind]
    small = of()
    h = small.call(F.silu, small.x)
    gathered = small.gather(h)
    small.call("mul_", h, 2.0)
    changes_nothing(small.rewrite(gathered), hoist)
