"""What the backward is given: selections, not the means to choose again; no activation of the full
hidden width that only frozen weights would need."""

from __future__ import annotations

import pytest
from torch import Tensor, fx

from benchmarks.support.graphs import Counted, batch_of, capture, llama
from benchmarks.support.published import RANK, plan_of
from tests.support.flop_models import BATCH, SHAPE

LEVELS = ((0.9, 0.5), (0.9, 0.5))
SAMPLED = 64  # tokens that a score looks at, by default
CHOOSING = ("topk", "sort", "pool_tokens", "low_rank_norms", "channel_scores")


def graphs(tokens: str, *, checkpointing: bool = False) -> tuple[list[Counted], list[Counted]]:
    model = llama(SHAPE, len(LEVELS))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return capture(model, batch_of(*BATCH), plan_of(LEVELS, tokens), rank=RANK)


def calls(graphs: list[Counted], *words: str) -> list[fx.Node]:
    nodes = [n for g in graphs for n in g.module.graph.nodes if n.op == "call_function"]
    return [n for n in nodes if any(word in str(n.target) for word in words)]


def on_factors(graphs: list[Counted]) -> list[fx.Node]:
    """Matmuls that project the sampled tokens on the factors of attention's three linears."""
    nodes = [n for g in graphs for n in g.module.graph.nodes if g.flops.get(n)]
    made = [(n, n.meta["val"]) for n in nodes]  # attention makes a tuple
    return [n for n, val in made if isinstance(val, Tensor) and val.shape == (SAMPLED, 3 * RANK)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_does_not_choose_again(checkpointing: bool) -> None:
    forwards, backwards = graphs("context", checkpointing=checkpointing)
    assert len(calls(forwards, "topk")) == 3 * len(LEVELS) and on_factors(forwards)
    again = calls(backwards, "sliced_linear.default")
    assert bool(again) == checkpointing  # blocks are run again, if so, on the channels chosen
    assert not calls(backwards, *CHOOSING) and not on_factors(backwards)


def saved(forward: Counted) -> list[fx.Node]:
    """Computed tensors that a forward keeps for the backward."""
    (outputs,) = forward.module.graph.output_node().args
    return [n for n in outputs if isinstance(n, fx.Node) and n.op != "placeholder"]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["all", "context"])
def test_no_full_hidden_width_is_saved_for_context_tokens(tokens: str) -> None:
    """Without adapters on the feed-forward: only the dense output tokens keep their full width."""
    samples, length, outputs = BATCH
    (forward,), _ = graphs(tokens)
    width = SHAPE["intermediate_size"]
    tensors = [n.meta["val"] for n in saved(forward) if hasattr(n.meta.get("val"), "shape")]
    assert len(tensors) > 10
    wide = [t for t in tensors if t.dim() >= 1 and t.shape[-1] == width]
    dense_rows = samples * outputs if tokens == "context" else 0
    assert all(t.numel() == dense_rows * width for t in wide), [t.shape for t in wide]
    assert bool(wide) == (tokens == "context")
    narrow = samples * (length - outputs) if tokens == "context" else samples * length
    assert any(t.shape[-1:] == (16,) and t.numel() == narrow * 16 for t in tensors)
