"""The work of a step, against a count by hand, and its FLOPs against torch's own of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparselora_fx as slx
from sparselora_fx.analysis.step_work import GraphWork, step_work
from sparselora_fx.compiler.tracer import TracedWork
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL, COLUMNS, ROWS
from sparselora_fx.model.unpacking import Layout
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.tracing import trace
from tests.support import oracle
from tests.support.ffn_example import FeedForward
from tests.support.slow import slow
from tests.support.small_graphs import Small
from tests.support.token_batches import ragged

T, K, N, KEPT = 6, 8, 16, 4


def counted(small: Small, *returned: fx.Node) -> GraphWork:
    gm = small.rewrite(*returned).gm
    inputs = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    found = step_work(gm, inputs)
    assert found is not None
    return found


def test_a_frozen_linear_has_two_products_and_a_trained_one_three() -> None:
    for trains, products in ((False, 2), (True, 3)):
        small = Small()
        x, w = small.input("x", T, K, trains=True), small.input("w", N, K, trains=trains)
        assert counted(small, small.linear(x, w)).flops == products * 2 * T * K * N
    small = Small()  # and nothing flows back into an input
    x, w = small.input("x", T, K), small.input("w", N, K)
    assert counted(small, small.linear(x, w)).flops == 2 * T * K * N


def test_sliced_linears_cost_what_they_keep() -> None:
    for op, inner, outer in ((OPS.sliced_linear, K, KEPT), (OPS.sliced_linear_in, KEPT, N)):
        for trains, products in ((False, 2), (True, 3)):
            small = Small()
            x = small.input("x", 2, T, inner, trains=True)
            w = small.input("w", N, K, trains=trains)
            y = small.call(op.default, x, w, small.input("idx", KEPT, dtype=torch.int64))
            assert counted(small, y).flops == products * 2 * 2 * T * inner * outer


def test_what_serves_the_choice_alone_is_told_apart() -> None:
    small = Small()
    x, w = small.input("x", T, K, trains=True), small.input("w", N, K)
    rows = small.call("detach", x)
    low = small.linear(rows, small.input("fb", 2, K))
    scores = small.call("sum", small.linear(low, small.input("fa", N, 2)), 0)
    idx = small.call(OPS.topk_channels.default, scores, KEPT)
    choosing = 2 * T * 2 * (K + N)
    y = small.call(OPS.sliced_linear.default, x, w, idx)
    found = counted(small, y, idx)
    assert (found.flops, found.choosing) == (2 * 2 * T * K * KEPT + choosing, choosing)


def test_ops_bytes_and_unpacked_elements_are_counted_beside_flops() -> None:
    """A product has FLOPs and no traffic, a sum the reverse, a view neither."""
    small = Small()
    x, w = small.input("x", T, K), small.input("w", N, K)
    y = small.linear(small.call("relu", x), w)
    found = counted(small, small.call("flatten", y, 0))
    assert (found.ops, found.traffic, found.unpacked) == (2, 2 * T * K * x_bytes(x), 0)
    form = Layout("scaled", N, K, K)
    for of, elements in ((ALL, N * K), (ROWS, KEPT * K), (COLUMNS, KEPT * N)):
        small = Small()
        read = small.input("x", T, KEPT if of == COLUMNS else K)
        packed, held = small.input("w", N, K, dtype=torch.int8), [small.input("scale", N)]
        idx = None if of == ALL else small.input("idx", KEPT, dtype=torch.int64)
        made = small.call(OPS.packed_linear.default, read, packed, held, form.encode(), idx, of)
        found = counted(small, made)
        assert (found.ops, found.traffic, found.unpacked) == (1, 0, elements)


def x_bytes(node: fx.Node) -> int:
    return int(node.meta["example_value"].element_size())


def test_an_op_that_needs_values_is_not_counted() -> None:
    assert step_work(fx.symbolic_trace(lambda x: torch.nonzero(x)), [torch.empty(T)]) is None
    assert TracedWork() + TracedWork(None, GraphWork(1)) == TracedWork(None, GraphWork(1))


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
        found.append(trace(get_runtime(model), {"x": torch.randn(2, 3, 8)}).work)
    plain, again = found
    assert plain.dense and plain.sparse and again.dense and again.sparse
    frozen, lora = 3 * 8 * 16, 2 * 2 * (8 + 16)  # multiplications for each of 6 tokens
    assert again.dense.flops - plain.dense.flops == 2 * 6 * (frozen + lora)
    lora -= 2 * 8  # the kept columns of up's B, and of down's A
    assert again.sparse.flops - plain.sparse.flops == 2 * 6 * (frozen // 2 + lora - 2 * 8)
    assert plain.sparse.choosing == again.sparse.choosing > 0


@pytest.mark.parametrize("trim", [slow(False), True])
def test_a_dense_step_of_a_model_counts_as_torch_counts_it(trim: bool) -> None:
    model = oracle.llama(layers=1, attention="eager")
    estimator = oracle.estimator_of(model)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, estimator, plan=plan, backend="eager", trim_logits=trim)
    work = trace(get_runtime(model), ragged()).work
    slx.restore(model)
    assert work.dense is not None and work.sparse is not None
    assert work.dense.flops == real(model, ragged())
    assert 0 < work.sparse.choosing < work.sparse.flops < work.dense.flops
    assert 0 < work.dense.ops < work.sparse.ops and work.dense.choosing == 0
