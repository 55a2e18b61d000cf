"""Padding where no graph sees the loss, or where rows are not the batch's tokens in their order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle

V, D, N = 31, 16, 40
Data = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]


def frozen(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, dtype=torch.float64).requires_grad_(False)


class Block(nn.Module):
    """A feed-forward block on rows in some order, and a causal convolution over tokens."""

    def __init__(self, there: Function, back: Function) -> None:
        super().__init__()
        self.up, self.down = frozen(D, N), frozen(N, D)
        self.conv = nn.Conv1d(D, D, 3, dtype=torch.float64)
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        rows = self.there(x)
        x = x + self.back(self.down(F.silu(self.up(rows)))).view_as(x)
        return x + self.conv(F.pad(x.mT, (2, 0))).mT


def same(x: Tensor) -> Tensor:
    return x


class Model(nn.Module):
    """Two such blocks, broken apart behind the first or not."""

    def __init__(self, there: Function = same, back: Function = same, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.layers = nn.ModuleList(Block(there, back) for _ in range(2))
        self.head = nn.Linear(D, V, dtype=torch.float64)
        self.broken = broken

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x = self.layers[0](self.embed(input_ids))
        if self.broken:
            torch._dynamo.graph_break()
        return loss_of(self.head(self.layers[1](x)), labels)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    return F.cross_entropy(logits.view(-1, V), targets)


def batch(samples: int = 2, length: int = 8) -> Data:
    """Padding on the left of the second sample."""
    ids = torch.randint(1, V, (samples, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 2 + 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compiled_step(model: nn.Module, data: Data, plan: Any = 0.5, **options: Any) -> oracle.Step:
    if not isinstance(plan, slx.SparsityPlan):
        plan = slx.SparsityPlan(plan, start_step=0, channel_multiple=1)
    torch.compiler.reset()
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)
    with slx.record(model) as record:
        done = step(model, data)
    done.record = record
    return done


def step(model: nn.Module, data: Data) -> oracle.Step:
    model.zero_grad(set_to_none=True)
    loss = model(**data)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return oracle.Step(loss.detach(), grads)


def reference_step(model: nn.Module, got: oracle.Step, data: Data, order: Function) -> oracle.Step:
    """Context tokens masked, all others dense, padding too; ``order`` brings tokens to rows."""
    context = F.pad(data["labels"][:, 1:], (0, 1), value=-100) == -100
    sparse = order((context & data["attention_mask"].bool())[..., None].double()).bool()

    def patch(linear: nn.Module, role: str, chosen: Tensor) -> None:
        kept = torch.zeros(linear.weight.shape[role == "in"], dtype=torch.float64)
        kept[chosen] = 1

        def forward(x: Tensor) -> Tensor:
            full = F.linear(x, linear.weight)
            cut = full * kept if role == "out" else F.linear(x * kept, linear.weight)
            return torch.where(sparse, cut, full) + linear.bias

        linear.forward = forward  # type: ignore[method-assign]

    for name, (role, chosen) in got.record.sites.items():
        patch(model.get_submodule(name), role, chosen)
    return step(model, data)


def check(model: nn.Module, data: Data, *, order: Function = same, **options: Any) -> oracle.Step:
    reference = copy.deepcopy(model)
    got = compiled_step(model, data, **options)
    oracle.assert_close(got, reference_step(reference, got, data, order), 1e-9)
    return got


@pytest.mark.parametrize("how", ["whole", "broken", "regional"])
def test_a_part_does_not_see_who_reads_its_rows(how: str) -> None:
    model = Model(broken=how == "broken")
    assert len(check(model, batch(), regional=how == "regional").record.sites) == 4


class Inverted(Model):
    """A part whose ``attention_mask`` is another one than the call's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        attention_mask = 1 - attention_mask
        torch._dynamo.graph_break()
        x = self.embed(input_ids)
        x = x + self.layers[0].down(F.silu(self.layers[0].up(x)))
        scores = (x @ x.mT)[:, None].masked_fill(attention_mask[:, None, None] == 0, -1e9)
        return loss_of(self.head(x + (scores.softmax(-1) @ x[:, None])[:, 0]), labels)


def test_an_input_that_took_the_masks_name() -> None:
    assert len(check(Inverted(), batch()).record.sites) == 2


class Outside(Model):
    """A model whose caller computes the loss, and reads padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.layers[0].down(F.silu(self.layers[0].up(x))))


def test_a_loss_that_no_graph_sees() -> None:
    data, model = batch(), Outside()
    reference = copy.deepcopy(model)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", shift=True)
    with slx.record(model) as record:
        got = model(**data)
    step_of = oracle.Step(got, {}, record)
    reference.forward = lambda **data: Outside.forward(reference, **data).sum()  # type: ignore[method-assign]
    expected = reference_step(reference, step_of, data, same).loss
    torch.testing.assert_close(got.sum(), expected, rtol=1e-12, atol=0)


def swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


ORDERS: dict[str, tuple[Function, Function]] = {
    "tokens first": (swapped, swapped),
    "tokens first, flattened": (
        lambda x: swapped(x).reshape(-1, x.shape[-1]),
        lambda y: swapped(y.view(4, 4, D)),
    ),
    "reversed": (lambda x: x.flip(1), lambda y: y.flip(1)),
    "rolled": (lambda x: x.roll(1, 1), lambda y: y.roll(-1, 1)),
    "picked": (lambda x: x[:, [3, 2, 1, 0]], lambda y: y[:, [3, 2, 1, 0]]),
}


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", ORDERS)
def test_rows_in_another_order_are_left_dense(name: str, regional: bool) -> None:
    """As many samples as tokens: shapes do not tell."""
    there, back = ORDERS[name]
    got = check(Model(there, back), batch(4, 4), order=there, regional=regional)
    assert not got.record.sites


@pytest.mark.parametrize(
    ("there", "back"),
    [(same, same), (lambda x: x.reshape(-1, D), same), (lambda x: swapped(swapped(x)), same)],
    ids=["as they are", "flattened", "there and back"],
)
def test_as_many_samples_as_tokens(there: Function, back: Function) -> None:
    got = check(
        Model(there, back), batch(4, 4), order=lambda x: there(x.expand(-1, -1, D))[..., :1]
    )
    assert len(got.record.sites) == 4


class Prompted(nn.Module):
    """Learned rows in front of the batch's tokens, and perhaps a cut before the first layer."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.prompt = nn.Parameter(torch.randn(1, 3, D, dtype=torch.float64))
        self.up, self.down = frozen(D, N), frozen(N, D)
        self.cut = cut

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.cat([self.prompt.expand(len(input_ids), -1, -1), self.embed(input_ids)], 1)
        x = F.rms_norm(x[:, 1:] if self.cut else x, (D,))
        x = self.down(F.silu(self.up(x)))[:, -input_ids.shape[1] :]
        return (x.square().sum(-1) * attention_mask).mean()


@pytest.mark.parametrize("context", ["pooled", "tokens", "strided:4"])
@pytest.mark.parametrize("cut", [False, True])
def test_padding_behind_a_prompt_is_not_scored(cut: bool, context: str) -> None:
    data = {k: v for k, v in batch(2, 8).items() if k != "labels"}
    plan = slx.SparsityPlan(0.75, tokens="all", start_step=0, channel_multiple=1, score=context)
    chosen = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randint(1, V, data["input_ids"].shape, generator=generator)
        ids = torch.where(data["attention_mask"].bool(), data["input_ids"], other)
        got = compiled_step(Prompted(cut), {**data, "input_ids": ids}, plan)
        chosen.append(got.record.selections[""]["ffn"])
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])


def test_rows_that_padding_cannot_be_told_among() -> None:
    model = Model(*ORDERS["reversed"])
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    assert not compiled_step(model, batch(), plan).record.sites
    assert "padding cannot be told" in slx.explain(model, verbose=True)
