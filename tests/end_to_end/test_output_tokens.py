"""Output tokens where the model computes no loss of its own: named by the user, or unknown."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny
from tests.support.token_batches import by_token, predicting, ragged

PLAN: dict[str, Any] = {"start_step": 0, "channel_multiple": 1}


def compiled(model: nn.Module, backend: str = "aot_eager", **plan: Any) -> nn.Module:
    sparsity = slx.SparsityPlan(oracle.mixed(model), **PLAN | plan)
    return slx.compile(model, oracle.estimator_of(model), plan=sparsity, backend=backend)


def unlabelled(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "labels"}


def own_loss(logits: Tensor, dense: Tensor) -> Tensor:
    """A loss that reads the logits of some tokens, and no labels."""
    return torch.logsumexp(logits.double(), -1)[dense].square().mean()


def gradients(model: nn.Module, loss: Tensor) -> oracle.Step:
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return oracle.Step(loss.detach(), grads)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["context", "key"])
def test_named_tokens_stay_dense(way: str) -> None:
    data = ragged()
    dense = predicting(data)
    model = compiled(oracle.llama(layers=1, dtype=torch.float64))
    with slx.record(model) as record:
        if way == "context":
            with slx.output_tokens(dense):
                out = model(**unlabelled(data))
        else:
            out = model(**unlabelled(data), output_tokens=dense)
    got = gradients(model, own_loss(out.logits, dense))
    slx.restore(model)
    assert len(record.sites) == 7
    by_token(model, record, dense, "dense")
    out = model(**unlabelled(data), use_cache=False)
    oracle.assert_close(got, gradients(model, own_loss(out.logits, dense)), 1e-9)


def test_named_tokens_take_the_place_of_labels_and_give_the_grid() -> None:
    data = ragged()
    model = compiled(tiny(), backend="eager")
    named = torch.zeros_like(predicting(data))
    named[:, 2:7] = True
    with slx.output_tokens(named):
        model(**data)
    sparse = int((data["attention_mask"].bool() & ~named).sum())
    tally = get_runtime(model).tally
    assert (tally.sparse, tally.real) == (
        sparse,
        int((data["attention_mask"].bool() | named).sum()),
    )


def test_the_key_is_hidden_from_the_model_in_evaluation_too() -> None:
    data, model = ragged(), oracle.llama()
    expected = model.eval()(**data).loss
    compiled(model.train(), backend="eager")
    got = model.eval()(**data, output_tokens=predicting(data)).loss
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [torch.ones(3, 17), torch.ones(17).bool(), [[True]]])
def test_what_names_no_tokens_is_refused(bad: Any) -> None:
    with pytest.raises(slx.PlanError, match="bool tensor"), slx.output_tokens(bad):
        pass


def test_a_mask_of_another_shape_is_refused() -> None:
    model = compiled(oracle.llama(), backend="eager")
    with pytest.raises(slx.PlanError, match=r"\(3, 16\).*\(3, 17\)"):
        model(**unlabelled(ragged()), output_tokens=torch.ones(3, 16).bool())


@contextlib.contextmanager
def told(fragment: str, times: int) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert sum(fragment in str(w.message) for w in caught) == times


def test_one_warning_where_nobody_knows_the_output_tokens() -> None:
    model = compiled(tiny(), backend="eager")
    with told("every token is sparse", 1):
        for seed in (1, 2):
            model(**unlabelled(ragged(seed=seed)))
    assert "every token was sparse in 2 calls" in slx.explain(model, verbose=True)


def test_no_warning_where_every_token_is_meant_to_be_sparse() -> None:
    model = compiled(tiny(), backend="eager", tokens="all")
    with told("every token is sparse", 0):
        model(**unlabelled(ragged()))


def preference_loss(model: nn.Module, data: dict[str, Any], completion: Tensor) -> Tensor:
    """A DPO step by hand: rows alternate between chosen and rejected answers; the reference is the
    model without its adapter."""

    def score() -> Tensor:
        logits = model(**unlabelled(data), use_cache=False).logits[:, :-1].double()
        chosen = data["input_ids"][:, 1:, None]
        return (logits.log_softmax(-1).gather(-1, chosen)[..., 0] * completion[:, 1:]).sum(-1)

    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        reference = score()
    margin = score() - reference
    return -F.logsigmoid(margin[::2] - margin[1::2]).mean()


def test_a_preference_step_and_its_dense_reference() -> None:
    data = oracle.batch(2, 17, padding=2)
    completion = data["attention_mask"].bool() & (torch.arange(17) >= 9)
    dense = F.pad(completion[:, 1:], (0, 1))
    model = compiled(oracle.llama(layers=1, dtype=torch.float64), backend="eager")
    with slx.record(model) as record, slx.output_tokens(dense):
        got = gradients(model, preference_loss(model, data, completion))
    slx.restore(model)
    assert len(record.sites) == 7

    reference = oracle.llama(layers=1, dtype=torch.float64)
    by_token(reference, record, dense, "dense")
    plain = oracle.llama(layers=1, dtype=torch.float64)

    class Pair(nn.Module):
        """The masked model with gradients, the plain one without."""

        def __call__(self, **batch: Any) -> Any:
            return (reference if torch.is_grad_enabled() else plain)(**batch)

        def disable_adapter(self) -> Any:
            return plain.disable_adapter()  # type: ignore[operator]

    loss = preference_loss(Pair(), data, completion)
    oracle.assert_close(got, gradients(reference, loss), 1e-9)


def test_a_pass_without_gradients_is_dense() -> None:
    data, model = ragged(), oracle.llama(dtype=torch.float64)
    expected = model(**data).logits.detach()
    compiled(model, backend="eager")
    with slx.record(model) as record, torch.no_grad():
        got = model(**data).logits
    assert record.sites == {} and oracle.difference(got, expected) < 1e-12
