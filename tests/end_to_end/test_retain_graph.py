"""A second backward through one forward gives the same gradients again, as under torch.compile."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparselora_fx as slx
from tests.support import oracle
from tests.support.slow import slow

VOCABULARY, WIDTH, CHANNELS = 31, 16, 40


class Model(nn.Module):
    """A feed-forward, applied twice, perhaps checkpointed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, CHANNELS) for _ in range(2)).requires_grad_(False)
        self.downs = nn.ModuleList(nn.Linear(CHANNELS, WIDTH) for _ in range(2))
        self.downs.requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def block(self, x: Tensor, number: int) -> Tensor:
        return x + self.downs[number](F.silu(self.ups[number](x)))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for number in range(2):
            if self.checkpointed:
                x = checkpoint(self.block, x, number, use_reentrant=False)
            else:
                x = self.block(x, number)
        logits = self.head(x)
        if labels is None:
            return logits.square().mean()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def twice(model: nn.Module, loss: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = []
    for keep in (True, False):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=keep)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found[0], found[1]


def batch(tokens: str) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    if tokens == "all":
        return {"input_ids": ids}
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def choices() -> list[Any]:
    """Eager whole; aot_eager in half; the rest is slow."""
    return [
        quick
        if backend == "eager" or (backend == "aot_eager" and checkpointed == (tokens == "context"))
        else slow(*quick)
        for backend in ("eager", "aot_eager", "inductor")
        for checkpointed in (False, True)
        for tokens in ("all", "context")
        for quick in [(backend, checkpointed, tokens)]
    ]


@pytest.mark.parametrize(("backend", "checkpointed", "tokens"), choices())
def test_two_backwards(backend: str, checkpointed: bool, tokens: str) -> None:
    torch.manual_seed(0)
    model = Model(checkpointed).double().train()
    plan = slx.SparsityPlan(0.5, tokens=tokens, start_step=0, channel_multiple=1)
    found = slx.SVDEstimator.build(model, rank=4, progress=False)
    slx.compile(model, found, plan=plan, backend=backend)
    with slx.record(model) as record:
        loss = model(**batch(tokens))
    assert len(record.sites) == 4
    first, second = twice(model, loss)
    assert first and first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("checkpointed", [False, slow(True)], ids=["plain", "checkpointed"])
def test_two_backwards_of_a_llama_with_token_lists(checkpointed: bool) -> None:
    model = oracle.llama(dtype=torch.float64)
    if checkpointed:
        options: Any = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    data = oracle.batch()
    data["labels"][:, :6] = -100
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    with slx.record(model) as record:
        loss = model(**data).loss
    assert len(record.sites) == 7
    first, second = twice(model, loss)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-12, atol=1e-14)
