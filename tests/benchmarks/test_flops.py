"""FLOPs counted from rewritten graphs against a count by hand."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.flops import DENSE, FACE, Counter, row
from benchmarks.support.graphs import Counted, llama
from benchmarks.support.published import LORA_RANK, MODELS, PLANS, RANK, Published
from tests.support.flop_models import BATCH, SHAPE
from tests.support.slow import slow

LEVEL = (0.9, 0.5)  # of 160 and 32 channels, 16 and 16 are kept


def by_hand(levels: list[tuple[float, float]], *, trained_below: bool) -> int:
    """FLOPs of a two-layer step, from the definition of each site; 2 per multiply-add.

    Context tokens: those that predict no label, 16 a sample. LoRA on q, k, v and o.
    """
    samples, length, outputs = BATCH
    tokens, context = samples * length, samples * (length - outputs)
    d, i, kv, head = 64, 160, 32, 16
    total = 2 * 2 * tokens * d * 112  # the head: forward, and backward to its input
    for layer, (ffn, attention) in enumerate(levels):
        below = trained_below or layer > 0  # whether the layer's input needs a gradient
        passes = 2 if below else 1
        qkv, o = d * d + 2 * d * kv, d * d
        kept = 0.5 if attention else 1.0
        on_context = (passes * qkv + 2 * o) * kept + 2 * 3 * d * i * (0.1 if ffn else 1.0)
        on_output = passes * qkv + 2 * o + 2 * 3 * d * i
        total += int(2 * (context * on_context + (tokens - context) * on_output))
        for n, k, into in ((d, d, below), (kv, d, below), (kv, d, below), (d, d, True)):
            # two matmuls forward; backward both weights, the bottleneck, and the input if needed
            total += 2 * tokens * LORA_RANK * (2 * (n + k) + n + (k if into else 0))
        total += 2 * samples * 4 * length * length * head * (2 + 4)  # scores and mix, full
        total += predictor(ffn, attention)
    return total


def predictor(ffn: float, attention: float) -> int:
    """FLOPs of the choice of channels, from 64 sampled context tokens."""
    sampled, d, i, total = 64, 64, 160, 0
    if ffn:
        total += 2 * 2 * sampled * RANK * (d + i)
    if attention:
        for n in (64, 32, 32):
            total += 2 * sampled * RANK * (d + RANK) + 2 * n * RANK * RANK
    return total


def test_dense_equals_the_count_by_hand() -> None:
    cost = Counter(SHAPE, BATCH).stack((DENSE, DENSE))
    assert cost.total == by_hand([DENSE, DENSE], trained_below=False)
    samples, length, _ = BATCH
    assert cost.head == 2 * 2 * samples * length * 64 * 112
    assert cost.attention == 2 * 2 * samples * 4 * length * length * 16 * (2 + 4)


@pytest.mark.parametrize("level", [(0.9, 0.0), slow((0.0, 0.5)), slow(LEVEL)])
def test_sparse_equals_the_count_by_hand(level: tuple[float, float]) -> None:
    cost = Counter(SHAPE, BATCH).stack((DENSE, level))
    assert cost.total == by_hand([DENSE, level], trained_below=False)
    assert cost.estimator == predictor(*level)


@pytest.mark.slow
def test_depth_is_a_sum_over_levels() -> None:
    levels = [DENSE, LEVEL, DENSE, LEVEL, DENSE]
    counter = Counter(SHAPE, BATCH)
    assert counter.depth(levels) == counter.stack(tuple(levels))


def test_held_bytes_count_each_storage_once_and_no_input() -> None:
    """Two values and a view of one: 2 * 3 * 5 fp32 numbers; the weight is the caller's."""

    def f(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x @ w
        return y.relu(), y.t(), y, w

    graph = make_fx(f)(torch.randn(3, 4), torch.randn(4, 5))
    assert Counted(graph).held() == 2 * 3 * 5 * 4


@pytest.mark.slow
def test_sparse_layers_hold_less() -> None:
    """Kept channels of context tokens, all of output tokens: less than a dense step's."""
    counter = Counter(SHAPE, BATCH)
    dense, sparse = counter.stack((DENSE, DENSE)), counter.stack((DENSE, LEVEL))
    assert 0 < sparse.held < dense.held
    assert counter.trimmed([DENSE, LEVEL, DENSE]).held > 0


def test_nothing_is_allocated() -> None:
    model = llama(MODELS["Llama-3-8B"], 32)
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())


@pytest.mark.slow
def test_a_row_has_the_fixed_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", {**SHAPE, "num_hidden_layers": 3})
    found = row(Published("tiny", "CSR", {0.9: (1,)}, {}, 65))
    assert set(FACE) <= set(found) and found["paper"] == 0.65
    assert 0 < found["share"] < 1


def test_every_published_plan_fits_its_model() -> None:
    for published in PLANS:
        levels = published.levels()
        assert len(levels) == MODELS[published.model]["num_hidden_layers"]
        assert any(level != DENSE for level in levels) and levels[0] == DENSE
