"""Which prediction a label belongs to: the traced graph knows, and the user may say it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.fx import symbolic_trace

import sparselora_fx as slx
from sparselora_fx.analysis.losses import shown_conventions
from sparselora_fx.model.conventions import Convention, convention_of
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.token_policy import split_tokens
from tests.support import oracle
from tests.support.slow import slow
from tests.support.token_batches import by_token, predicting, ragged

Loss = Callable[[Tensor, Tensor], Tensor]


def same_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return same_token(logits, F.pad(labels, (0, 1), value=-100)[..., 1:])


def unseen(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss in words that no pass knows; shifted."""
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -(chosen * (labels[:, 1:] != -100)).sum() / 9


class FeedForward(nn.Module):
    """A model of one feed-forward, whose loss is given."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.embedding = nn.Embedding(oracle.VOCABULARY, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, oracle.VOCABULARY, bias=False)
        self.loss = loss

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x = self.embedding(input_ids)
        x = x + self.down(torch.relu(self.up(x)))
        logits = self.head(x)
        return SimpleNamespace(loss=self.loss(logits, labels), logits=logits)


def feed_forward(loss: Loss) -> nn.Module:
    torch.manual_seed(0)
    lora = oracle.lora_config(("up", "down"))
    lora.task_type = None
    return oracle.randomise(get_peft_model(FeedForward(loss), lora)).double().train()


EITHER = predicting(ragged()) | (ragged()["labels"] != -100)
DENSE = {
    same_token: ragged()["labels"] != -100,
    next_token: predicting(ragged()),
    unseen: EITHER,
}


@pytest.mark.parametrize(
    ("loss", "trim"),
    [
        (same_token, False),
        (next_token, True),
        (unseen, False),
        slow(same_token, True),
        slow(next_token, False),
        slow(unseen, True),
    ],
)
def test_the_first_sparse_step_has_the_right_tokens_dense(loss: Loss, trim: bool) -> None:
    """In the very first call, which has traced nothing before."""
    model, data = feed_forward(loss), ragged()
    plan = slx.SparsityPlan({"up": 0.5, "down": 0.5}, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, trim_logits=trim, restore=False)
    counts = get_runtime(model).tally
    assert counts.calls == 1 and counts.real - counts.sparse == int(DENSE[loss].sum())
    assert get_runtime(model).graphs == 1
    slx.restore(model)
    assert len(got.record.sites) == 2
    by_token(model, got.record, DENSE[loss], "dense")
    oracle.assert_close(got, oracle.step(model, data), 1e-9)


def test_a_first_call_that_only_a_wrong_guess_makes_dense() -> None:
    """Labels on every other token: by either convention all carry loss, by the graph's half do."""
    model, data = feed_forward(same_token), ragged(1, 16)
    data["labels"] = data["input_ids"].clone()
    data["labels"][:, ::2] = -100
    plan = slx.SparsityPlan({"up": 0.5, "down": 0.5}, start_step=0, channel_multiple=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = oracle.run_compiled(model, data, plan, backend="eager", restore=False)
    assert len(got.record.sites) == 2
    counts = get_runtime(model).tally
    assert (counts.calls, counts.dense_calls, counts.sparse) == (1, 0, 8)
    assert not get_runtime(model).dense_calls


@pytest.mark.parametrize("shift", [True, False])
def test_what_the_user_says_stands_and_is_contradicted_aloud(shift: bool) -> None:
    model, data = feed_forward(same_token), ragged()
    plan = slx.SparsityPlan({"up": 0.5, "down": 0.5}, start_step=0, channel_multiple=1)
    estimator = oracle.estimator_of(model)
    slx.compile(model, estimator, plan=plan, backend="eager", shift=shift)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**data)
    assert sum("shift=True was said" in str(w.message) for w in caught) == int(shift)
    dense = DENSE[next_token if shift else same_token]
    assert get_runtime(model).tally.real - get_runtime(model).tally.sparse == int(dense.sum())


@pytest.mark.slow
def test_a_causal_class_with_a_loss_of_its_own() -> None:
    """Trusted by its class until a loss function is set; then the graph decides."""
    model, data = oracle.llama(dtype=torch.float64), ragged()
    base = model.get_base_model()
    assert convention_of(model, None).shift is True

    def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return same_token(logits, labels)

    base.loss_function = loss_function
    assert convention_of(model, None).shift is None
    dense = data["labels"] != -100
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan)
    assert len(got.record.sites) == 7
    by_token(model, got.record, dense, "dense")
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-9)


def test_without_a_traced_loss_either_label_makes_a_token_dense() -> None:
    tokens = split_tokens(slx.SparsityPlan(0.5), ragged(), shift=None)
    assert tokens is not None and torch.equal(tokens.dense & EITHER, EITHER)


def test_graphs_that_disagree_leave_both_in_force() -> None:
    convention = Convention(True)
    assert not convention.learn({True}) and convention.shift is True
    assert convention.learn({False}) and convention.shift is None
    assert not convention.learn({False})
    assert Convention(False).learn({True})


def test_labels_of_whole_samples_show_nothing() -> None:
    graph = symbolic_trace(lambda logits, labels: F.cross_entropy(logits, labels.view(-1))).graph
    for node, shape in zip(graph.nodes, [(3, 7), (3,), (3,)], strict=False):
        dtype = torch.float32 if len(shape) == 2 else torch.int64
        node.meta["example_value"] = torch.empty(shape, dtype=dtype)
    assert shown_conventions(graph) == set()


def test_a_shift_that_is_no_answer_is_refused_and_nothing_changes() -> None:
    model = feed_forward(next_token)
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    with pytest.raises(slx.CompileError, match="shift must be True"):
        slx.compile(model, oracle.estimator_of(model), plan={"up": 0.5}, shift=1)  # type: ignore[arg-type]
    oracle.assert_untouched(model, before, weights)
