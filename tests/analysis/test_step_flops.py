"""FLOPs of a step, against a count by hand and against torch's own of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparselora_fx as slx
from sparselora_fx.analysis.step_flops import GraphFlops, step_flops
from sparselora_fx.compiler.tracer import TracedFlops
from sparselora_fx.ir.ops import OPS
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.tracing import trace
from tests.support import oracle
from tests.support.ffn_example import FeedForward
from tests.support.small_graphs import Small
from tests.support.token_batches import ragged

T, K, N, KEPT = 6, 8, 16, 4


def counted(small: Small, *returned: fx.Node) -> GraphFlops | None:
    gm = small.rewrite(*returned).gm
    return step_flops(gm, [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")])


def test_a_frozen_linear_has_two_products_and_a_trained_one_three() -> None:
    for trains, products in ((False, 2), (True, 3)):
        small = Small()
        x, w = small.input("x", T, K, trains=True), small.input("w", N, K, trains=trains)
        assert counted(small, small.linear(x, w)) == GraphFlops(products * 2 * T * K * N)
    small = Small()  # and nothing flows back into an input
    x, w = small.input("x", T, K), small.input("w", N, K)
    assert counted(small, small.linear(x, w)) == GraphFlops(2 * T * K * N)


def test_sliced_linears_cost_what_they_keep() -> None:
    for op, inner, outer in ((OPS.sliced_linear, K, KEPT), (OPS.sliced_linear_in, KEPT, N)):
        for trains, products in ((False, 2), (True, 3)):
            small = Small()
            x = small.input("x", 2, T, inner, trains=True)
            w = small.input("w", N, K, trains=trains)
            y = small.call(op.default, x, w, small.input("idx", KEPT, dtype=torch.int64))
            assert counted(small, y) == GraphFlops(products * 2 * 2 * T * inner * outer)


def test_what_serves_the_choice_alone_is_told_apart() -> None:
    small = Small()
    x, w = small.input("x", T, K, trains=True), small.input("w", N, K)
    rows = small.call("detach", x)
    low = small.linear(rows, small.input("fb", 2, K))
    scores = small.call("sum", small.linear(low, small.input("fa", N, 2)), 0)
    idx = small.call(OPS.topk_channels.default, scores, KEPT)
    choosing = 2 * T * 2 * (K + N)
    y = small.call(OPS.sliced_linear.default, x, w, idx)
    assert counted(small, y, idx) == GraphFlops(2 * 2 * T * K * KEPT + choosing, choosing)


def test_an_op_that_needs_values_is_not_counted() -> None:
    assert step_flops(fx.symbolic_trace(lambda x: torch.nonzero(x)), [torch.empty(T)]) is None
    assert TracedFlops() + TracedFlops(None, GraphFlops(1)) == TracedFlops(None, GraphFlops(1))


def real(model: nn.Module, data: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**data).loss.backward()
    return int(counter.get_total_flops())


class Checkpointed(FeedForward):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_forward_counts_twice() -> None:
    """Its linears a second time; sparse the same, but for the choice, which is kept."""
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    found = []
    for model in (FeedForward(), Checkpointed()):
        estimator = slx.SVDEstimator.build(model, rank=2, progress=False)
        slx.compile(model, estimator, plan=plan, backend="eager")
        found.append(trace(get_runtime(model), {"x": torch.randn(2, 3, 8)}).flops)
    plain, again = found
    assert plain.dense and plain.sparse and again.dense and again.sparse
    frozen, lora = 3 * 8 * 16, 2 * 2 * (8 + 16)  # multiplications for each of 6 tokens
    assert again.dense.total - plain.dense.total == 2 * 6 * (frozen + lora)
    lora -= 2 * 8  # the kept columns of up's B, and of down's A
    assert again.sparse.total - plain.sparse.total == 2 * 6 * (frozen // 2 + lora - 2 * 8)
    assert plain.sparse.choosing == again.sparse.choosing > 0


@pytest.mark.parametrize("trim", [False, True])
def test_a_dense_step_of_a_model_counts_as_torch_counts_it(trim: bool) -> None:
    model = oracle.llama(layers=1, attention="eager")
    estimator = oracle.estimator_of(model)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, estimator, plan=plan, backend="eager", trim_logits=trim)
    flops = trace(get_runtime(model), ragged()).flops
    slx.restore(model)
    assert flops.dense == GraphFlops(real(model, ragged())) and flops.sparse is not None
    assert 0 < flops.sparse.choosing < flops.sparse.total < flops.dense.total
