"""Labels that a Trainer takes away from the model reach the token policy all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.user.trainer_labels import hide_labels, kept_labels, show_labels
from tests.support import oracle
from tests.support.slow import slow
from tests.support.token_batches import by_token, predicting, ragged

PLAN = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)


def shifted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Own(Trainer):  # type: ignore[misc]
    """A loss of the user's own, in a subclass."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        return shifted_loss(model(**inputs), labels)


def trainer_of(
    model: Any, folder: Path, kind: type[Trainer] = Trainer, loss: Any = None, **options: Any
) -> Trainer:
    data = ragged()
    rows = [{key: value[i] for key, value in data.items()} for i in range(3)]
    args = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=3, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    return kind(
        model, args, train_dataset=rows, callbacks=[slx.SparsityCallback()], compute_loss_func=loss
    )


def gradients(model: Any, loss: Tensor) -> oracle.Step:
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return oracle.Step(loss.detach(), grads)


def test_label_smoothing_has_the_labels_tokens_dense(tmp_path: Path) -> None:
    model, data = oracle.llama(dtype=torch.float64), ragged()
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="eager")
    show_labels(trainer, get_runtime(model))
    with slx.record(model) as record:
        got = gradients(model, trainer.compute_loss(model, dict(data)))
    slx.restore(model)
    assert len(record.sites) == 7
    by_token(model, record, predicting(data), "dense")
    oracle.assert_close(got, gradients(model, trainer.compute_loss(model, dict(data))), 1e-9)


EITHER = predicting(ragged()) | (ragged()["labels"] != -100)


@pytest.mark.parametrize(
    ("kind", "options", "dense"),
    [
        (Trainer, {}, predicting(ragged())),
        slow(Trainer, {"label_smoothing_factor": 0.1}, predicting(ragged())),
        slow(Trainer, {"loss": shifted_loss}, EITHER),
        (Own, {}, EITHER),
    ],
    ids=["labels", "label-smoothing", "compute-loss-func", "subclass"],
)
def test_a_trainer_with_the_callback(
    kind: Any, options: Any, dense: Tensor, tmp_path: Path
) -> None:
    """A loss that nobody has seen may shift labels or not: tokens of both readings are dense."""
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="eager")
    trainer = trainer_of(model, tmp_path, kind, **options)
    trainer.train()
    tally = get_runtime(model).tally
    assert tally.calls == 1 and tally.real - tally.sparse == int(dense.sum())
    assert "compute_loss" not in trainer.__dict__ and get_runtime(model).kept_labels is None


def test_what_stood_on_the_trainer_stands_there_again(tmp_path: Path) -> None:
    """Also when a training before was cut short."""
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=PLAN, backend="eager")
    trainer = trainer_of(model, tmp_path)
    mine = trainer.compute_loss
    trainer.compute_loss = mine
    for _ in range(2):
        show_labels(trainer, get_runtime(model))
    hide_labels(trainer)
    assert trainer.__dict__["compute_loss"] is mine


def test_completion_masks_are_labels() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    kept = kept_labels({"completion_mask": mask}, own_loss=False)
    assert kept is not None and kept.own_loss
    assert (kept.labels != -100).tolist() == [[False, False, True, True]]
    assert kept_labels({"input_ids": mask}, own_loss=True) is None
    assert kept_labels([mask], own_loss=True) is None
