"""Logits, loss and the end of the last block on labelled rows only: nothing that trains changes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, fx, nn

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.trim_logits import trim_logits
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support import oracle
from tests.support.bert import bert
from tests.support.labelled_models import ROUNDING, SPARSE, Plain, compare, plan_of
from tests.support.rewritten_graphs import rewritten
from tests.support.small_graphs import (
    Small,
    after,
    changes_nothing,
    list_values,
    shown,
    text,
    values_of,
)
from tests.support.token_batches import ragged

LABELS = torch.tensor([[-100, -100, 4, 1], [-100, 2, 0, -100]])
SHIFTED = torch.tensor([[False, True, True, False], [True, True, False, False]])  # predict a label


def labelled(
    *,
    target: Callable[[Small, fx.Node], fx.Node] | None = None,
    also: Callable[[Small, fx.Node], Any] | None = None,
    shift: bool = True,
    weighted: bool = False,
    **options: Any,
) -> Rewrite:
    """An output embedding behind its marker, and a loss on the labels."""
    small = Small()
    h = small.input("h", 2, 4, 8, trains=True)
    labels = small.input("labels", 2, 4, dtype=torch.int64)
    lists = small.lists("p", 6, 2, 4)
    mark = small.call(OPS.label_rows.default, h, labels, *lists, shift)
    z = small.linear(mark, small.input("w", 6, 8, trains=True))
    options |= {"weight": small.input("class_weight", 6)} if weighted else {}
    own = (target or next_labels)(small, labels)
    loss = small.call(F.cross_entropy, small.call("view", z, -1, 6), own, **options)
    return small.rewrite(loss, z if also is None else also(small, z))


def next_labels(small: Small, labels: fx.Node, value: int = -100) -> fx.Node:
    shifted = small.call(F.pad, labels, (0, 1), value=value)
    return small.call(
        "reshape", small.call(operator.getitem, shifted, (Ellipsis, slice(1, None))), -1
    )


def own_labels(small: Small, labels: fx.Node) -> fx.Node:
    return small.call("view", labels, -1)


def loss_of(rewrite: Rewrite, taken: Tensor) -> list[Tensor]:
    """The loss and its gradients; logits are returned or not."""
    output = rewrite.graph.output_node()
    held = output.args
    output.args = ((held[0][0],),)  # type: ignore[index]
    got = values_of(rewrite, labels=LABELS, **list_values("p", taken, 6))
    output.args = held
    return got


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_reads_labelled_rows_alone(reduction: str) -> None:
    rewrite = labelled(reduction=reduction)
    expected = loss_of(rewrite, SHIFTED)
    assert after(rewrite, trim_logits) == 1
    for one, other in zip(loss_of(rewrite, SHIFTED), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert text(rewrite) == shown(f"""
        v0 = linear(h, w, None)
        v1 = pad(labels, (0, 1), value=-100)
        v2 = getitem(v1, (Ellipsis, slice(1, None, None)))
        v3 = reshape(v2, -1)
        v4 = view(v0, -1, 6)
        v5 = gather_tokens(v4, p_idx, p_pos)
        v6 = clamp(p_idx, min=0)
        v7 = ge(p_idx, 0)
        v8 = index_select(v3, 0, v6)
        v9 = where(v7, v8, -100)
        v10 = cross_entropy(v5, v9, reduction='{reduction}')
        return (v10, None)
    """)
    changes_nothing(rewrite, trim_logits)


def test_labels_that_are_not_shifted() -> None:
    rewrite = labelled(target=own_labels, shift=False)
    expected = loss_of(rewrite, LABELS >= 0)
    assert after(rewrite, trim_logits) == 1
    for one, other in zip(loss_of(rewrite, LABELS >= 0), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"also": lambda s, z: s.call("logsumexp", z, -1)},
        {"target": own_labels},
        {"target": lambda s, labels: next_labels(s, labels, 0)},
        {"ignore_index": 0},
        {"reduction": "none"},
        {"weighted": True},
    ],
    ids=["logits are read", "another convention", "filled with a label", "other labels ignored",
         "no sum", "weighted"],
)  # fmt: skip
def test_near_misses_are_computed_whole_and_say_so(options: dict[str, Any]) -> None:
    rewrite = labelled(**options)
    before = text(rewrite)
    with pytest.warns(UserWarning, match="every logit is computed"):
        assert after(rewrite, trim_logits) == 0
    assert "gather_tokens" not in text(rewrite) and "label_rows" not in text(rewrite)
    assert len(text(rewrite).splitlines()) == len(before.splitlines()) - 1  # the marker


ATTENTION, FEED_FORWARD = ["q", "k", "v", "o"], ["gate", "up", "down", "o"]
WHOLE = SPARSE | {"layers.1.mlp": 0.6, "layers.1.self_attn": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sparsity", "targets", "dropout"),
    [
        ({"layers.0": 0.5}, ATTENTION, 0.0),
        ({"layers.0": 0.5}, FEED_FORWARD, 0.1),
        (0.5, ATTENTION, 0.1),
        (0.5, FEED_FORWARD, 0.0),
    ],
)
def test_nothing_changes_in_fp64(sparsity: Any, targets: list[str], dropout: float) -> None:
    """A dense or a sparse last layer, other targets, dropout: every pair of values."""
    torch.manual_seed(0)
    lora = oracle.lora_config(tuple(targets), dropout)
    lora.task_type = None
    model = oracle.randomise(get_peft_model(Plain(), lora)).double().train()
    compare(model, ragged(), plan_of(sparsity), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [oracle.ATTENTION_TARGETS, "all-linear"])
@pytest.mark.parametrize("sparsity", [SPARSE, WHOLE], ids=["dense-last", "sparse-last"])
def test_loss_and_gradients_stay(sparsity: Any, targets: Any) -> None:
    model = oracle.llama(layers=2, targets=targets, dtype=torch.float64, bias=True)
    compare(model, ragged(), plan_of(sparsity), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"tokens": "all"}, {"sink_tokens": 2}, {"sparse_outputs": 0.5}],
    ids=["all", "sinks", "sparse-outputs"],
)
def test_other_token_policies_have_a_list_of_their_own(options: Any) -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    compare(model, ragged(), plan_of(WHOLE, **options))


@pytest.mark.slow
def test_dropout_draws_the_same_masks() -> None:
    model = oracle.llama(layers=2, dropout=0.1, dtype=torch.float64)
    compare(model, ragged(), plan_of(SPARSE))


@pytest.mark.slow
def test_a_sum_over_a_number_of_items() -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    compare(model, {**ragged(), "num_items_in_batch": torch.tensor(11)}, plan_of(SPARSE))


@pytest.mark.slow
def test_gradient_checkpointing() -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, ragged(), plan_of(SPARSE), backend="aot_eager")


@pytest.mark.slow
def test_padding_on_the_left() -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    compare(model, ragged(left=True), plan_of(WHOLE))


@pytest.mark.slow
def test_a_masked_language_model_is_not_shifted() -> None:
    model = bert(layers=2, hidden=32, wide=64, heads=4)
    compare(model, ragged(), plan_of(0.5))


@pytest.mark.slow
def test_inductor() -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS)
    steps = []
    for trim in (False, True):
        estimator = oracle.estimator_of(model)
        slx.compile(model, estimator, plan=plan_of(WHOLE), trim_logits=trim)
        steps.append(oracle.step(model, ragged()))
        slx.restore(model)
    oracle.assert_close(steps[1], steps[0], 1e-5)


@pytest.mark.slow
def test_other_lengths_and_numbers_of_labels() -> None:
    model = oracle.llama(layers=1, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    data = [ragged(3, 17), ragged(3, 25), ragged(2, 31), ragged(3, 40)]
    losses: list[list[float]] = []
    for trim in (False, True):
        slx.compile(
            model, oracle.estimator_of(model), plan=plan_of(0.5), backend="eager", trim_logits=trim
        )
        losses.append([model(**batch).loss.item() for batch in data])
        slx.restore(model)
    assert losses[1] == pytest.approx(losses[0], rel=ROUNDING)


def test_context_tokens_stop_at_the_last_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last attention, every matmul has as many rows as the list of labelled tokens."""
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    data = ragged()
    graph, report = rewritten(monkeypatch, model, data, plan_of(SPARSE), trim_logits=True)
    assert report.counts["trim_logits"] == 1
    nodes = list(graph.nodes)
    attention = max(
        i for i, n in enumerate(nodes) if "scaled_dot_product" in str(n.target) and n.users
    )
    linears = [n for n in nodes[attention:] if getattr(n.target, "__name__", "") == "linear"]
    assert len(linears) == 7  # o with its LoRA branch, gate, up, down, the output embedding
    assert all(n.meta["example_value"].dim() == 2 for n in linears)


class OtherLoss(nn.Module):
    """A causal model whose loss also looks at the logits of every token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()  # type: ignore[operator, no-any-return]

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        found.loss = found.loss + found.logits.logsumexp(-1).square().mean()
        return found


@pytest.mark.slow
def test_logits_that_are_read_are_kept() -> None:
    model = OtherLoss(oracle.llama(layers=1, dtype=torch.float64)).train()
    plain = oracle.run_compiled(model, ragged(), plan_of(0.5), "aot_eager")
    slx.compile(
        model, oracle.estimator_of(model), plan=plan_of(0.5), backend="aot_eager", trim_logits=True
    )
    with pytest.warns(UserWarning, match="every logit is computed"):
        got = oracle.step(model, ragged())
    assert model(**ragged()).logits is not None
    oracle.assert_close(got, plain, 1e-12)
    slx.restore(model)


def test_labels_of_another_kind_are_not_trimmed() -> None:
    model = oracle.llama(layers=1, dtype=torch.float64)
    data = ragged()
    data["shift_labels"] = torch.nn.functional.pad(data["labels"], (0, 1), value=-100)[
        :, 1:
    ].clone()
    slx.compile(
        model, oracle.estimator_of(model), plan=plan_of(0.5), backend="eager", trim_logits=True
    )
    with pytest.warns(UserWarning, match="every logit is computed"):
        oracle.step(model, data)
    slx.restore(model)


def test_evaluation_returns_logits() -> None:
    model = oracle.llama(layers=1)
    slx.compile(
        model, oracle.estimator_of(model), plan=plan_of(0.5), backend="eager", trim_logits=True
    )
    assert model.eval()(**ragged()).logits is not None
    slx.restore(model)


def test_what_cannot_be_trimmed_is_refused() -> None:
    model = oracle.llama(layers=1)
    estimator = oracle.estimator_of(model)
    with pytest.raises(slx.CompileError, match="regional"):
        slx.compile(model, estimator, regional=True, trim_logits=True)
    headless = model.get_base_model().model
    with pytest.raises(slx.CompileError, match="get_output_embeddings"):
        slx.compile(headless, oracle.estimator_of(headless), trim_logits=True)
