"""Whose rows are read: what is proven holds on numbers, and what mixes rows is not proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparselora_fx.analysis import mask_values, padding_proof
from sparselora_fx.analysis.token_liveness import LiveRows, Rows, read_rows
from tests.support.rows import (
    BATCH,
    BIAS,
    EARLIER,
    HEAD,
    LENGTH,
    REAL,
    SHOWN,
    WIDTH,
    WORDS,
    Function,
    W,
    additive,
    captured,
    heads,
    labels_of,
    loss_of,
    proves,
    random,
    written_with,
)


def needs_of(fn: Function, x: Tensor) -> LiveRows | None:
    """What is needed of x if of the result ``[B, L, ...]`` real tokens alone are."""
    graph = captured(fn, x)[0].graph

    def end(user: fx.Node, node: fx.Node, rows: Rows) -> LiveRows | None:
        return LiveRows(0, 1, REAL) if user.op == "output" else None

    return read_rows(graph, end).get(graph.find_nodes(op="placeholder")[0])


def updated(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    y *= 0.5
    return y


def updated_and_read(x: Tensor) -> Tensor:
    y = x * 2
    z = y.sum(dim=1, keepdim=True)
    y += x
    return y + z


def updated_elsewhere(x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, :1]
    view += x.mean(dim=1, keepdim=True)
    return y


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((torch.stack((-b, a), dim=-1).flatten(-2), x), dim=-1)


class Squared(torch.autograd.Function):
    """A user's own function, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


TOKENWISE: dict[str, Function] = {
    "pointwise": lambda x: F.silu(x) * x.sigmoid() + 1,
    "norm": lambda x: F.layer_norm(x, (WIDTH,)) * F.rms_norm(x, (WIDTH,)),
    "mean": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean without keepdim": lambda x: x - x.mean(-1).unsqueeze(-1),
    "mean over two": lambda x: x.view(BATCH, LENGTH, 2, 3).sum((2, 3)).unsqueeze(-1) + x,
    "stacked and averaged": lambda x: torch.stack((x, 2 * x, x * x)).mean(dim=0),
    "stacked behind": lambda x: torch.stack((x, -x), dim=2).flatten(2),
    "linear": lambda x: F.linear(x, W) @ W,
    "flattened": lambda x: F.linear(x.view(-1, WIDTH), W).view(BATCH, LENGTH, WIDTH),
    "heads": lambda x: x.view(BATCH, LENGTH, 2, 3).transpose(1, 2).softmax(-1).transpose(1, 2),
    "fused": lambda x: x.view(BATCH, LENGTH, 2, 3)[..., 0, :] + x[..., 1:4],
    "list of heads": lambda x: x.view(BATCH, LENGTH, 3, 2)[:, :, [-2]] * x[..., None, :2],
    "repeated": lambda x: x.repeat(1, 1, 2) + x.repeat_interleave(2, dim=-1),
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 3, -1).reshape(BATCH, LENGTH, -1),
    "halves": halves,
    "largest": lambda x: x - x.max(-1, keepdim=True).values + x.topk(2, dim=-1).values[..., :1],
    "split": lambda x: torch.cat([p.tanh() for p in x.split((2, 4), dim=-1)], -1),
    "updated in place": updated,
    "own function": lambda x: Squared.apply(x) + x,
    "prefix": lambda x: x[:, :LENGTH] * 2,
}
MIXING: dict[str, Function] = {
    "neighbours": lambda x: x + F.pad(x[:, 1:], (0, 0, 0, 1)),
    "mean of tokens": lambda x: x - x.mean(dim=1, keepdim=True),
    "mean of all": lambda x: x - x.mean(),
    "cumulative": lambda x: x.cumsum(dim=1),
    "softmax over tokens": lambda x: x.softmax(dim=1),
    "convolution": lambda x: F.conv1d(x.mT, W[..., None], padding=0).mT.flip(1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "products of tokens": lambda x: (x @ x.mT) @ x,
    "first token": lambda x: x + x[:, :1],
    "one token": lambda x: x + x[:, 0].unsqueeze(1),
    "every other": lambda x: torch.cat((x[:, ::2], x[:, 1::2]), dim=1),
    "list of tokens": lambda x: x + x[:, [3]],
    "tokens repeated": lambda x: x.repeat_interleave(2, dim=1)[:, :LENGTH],
    "tokens stacked": lambda x: torch.stack((x, x), dim=1).flatten(1, 2)[:, LENGTH - 1 : -1],
    "tokens as channels": lambda x: x.reshape(BATCH, WIDTH, LENGTH).mT,
    "transposed": lambda x: x.mT.reshape(BATCH, LENGTH, WIDTH),
    "updated and read": updated_and_read,
    "updated through a view": updated_elsewhere,
    "norm over tokens": lambda x: F.layer_norm(x, (LENGTH, WIDTH)),
    "sorted": lambda x: x.sort(dim=1).values,
    "mean of samples": lambda x: x - x.mean(dim=0, keepdim=True),
    "samples in another order": lambda x: x[[1, 0]],
    "softmax over samples": lambda x: x.softmax(dim=0),
    "softmax over what torch takes": lambda x: F.softmax(x),
    "sorted samples": lambda x: x.sort(dim=0).values,
    "samples split": lambda x: torch.cat(x.split(1)[::-1]),
    "first sample": lambda x: x + x[:1],
    "norm over samples": lambda x: F.layer_norm(x.transpose(0, 1), (BATCH, WIDTH)).transpose(0, 1),
    "all rows": lambda x: F.linear(x.view(-1, WIDTH), W).softmax(0).view(BATCH, LENGTH, WIDTH),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_what_works_token_by_token(name: str) -> None:
    fn, x = TOKENWISE[name], random(BATCH, LENGTH, WIDTH)
    assert needs_of(fn, x) == LiveRows(0, 1, REAL)
    other = torch.where(SHOWN[..., None], x, torch.nan)
    assert torch.equal(fn(x)[SHOWN], fn(other)[SHOWN])


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens(name: str) -> None:
    assert needs_of(MIXING[name], random(BATCH, LENGTH, WIDTH)) is None


# ---------------------------------------------------------------- attention and its mask


def fused(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(x), attn_mask=additive(mask))


def written_out(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = q @ k.transpose(2, 3) * 3**-0.5 + additive(mask)
    return F.dropout(scores.softmax(-1, dtype=torch.float64), 0.1, False) @ v


def scaled_later(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = torch.matmul(q, k.mT).masked_fill(~mask[:, None, None, :], -1e300) / 2.0
    return torch.matmul(scores.softmax(-1), v)


def capped(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = 5 * torch.tanh(q @ k.mT / 5)
    return torch.where(mask[:, None, None, :], scores, -torch.inf).softmax(-1) @ v


def sinks(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = torch.cat((q @ k.mT + additive(mask), q[..., :1]), dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def batched(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.reshape(2 * BATCH, LENGTH, 3) for t in heads(x))
    scores = torch.baddbmm(BIAS, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    scores = scores.view(BATCH, 2, LENGTH, LENGTH) + additive(mask)
    weights = scores.softmax(dim=-1).view(2 * BATCH, LENGTH, LENGTH)
    return torch.bmm(weights, v).view(BATCH, 2, LENGTH, 3)


def unmasked(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(x)) * mask[:, None, :, None]


def causal(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(x), is_causal=True) * mask[:, None, :, None]


def positions(mask: Tensor) -> Tensor:
    """A bias of distances between the real tokens, and 0 for later ones."""
    place = mask.long().cumsum(-1)
    distance = (place[:, None, :] - place[:, :, None])[:, None]
    return torch.where(EARLIER, 0.1 * distance, -1e30)


NOT_HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positions alone": lambda s, m: s + positions(m),
    "0 and 1 added": lambda s, m: s + m[:, None, None, :].double(),
    "filled with 0": lambda s, m: s.masked_fill(~m[:, None, None, :], 0.0),
    "inverted": lambda s, m: s.masked_fill(m[:, None, None, :], -1e30),
    "or near": lambda s, m: s.masked_fill(
        ~(m[:, None, None, :] | (EARLIER & EARLIER.mT.roll(1, 1))), -1e30
    ),
    "and itself": lambda s, m: s.masked_fill(
        ~(m[:, None, None, :] | m[:, None, :, None] & ~m[:, None, None, :]), -1e30
    ),
    "scaled away": lambda s, m: (s + additive(m)) * 1e-29,
    "lengths": lambda s, m: s.masked_fill(
        torch.arange(LENGTH) >= m.sum(-1)[:, None, None, None], -1e30
    ),
    "causal alone": lambda s, m: s.masked_fill(~EARLIER, -1e30),
    "changed in place": lambda s, m: s + additive(m).mul_(0.0),
}


def masked_queries(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    return (q @ k.mT + additive(mask).mT[..., :1]).softmax(-1) @ v


def masked_after(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    return ((q @ k.mT).softmax(-1) + additive(mask)) @ v


def read_beside(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = q @ k.mT
    return (scores + additive(mask)).softmax(-1) @ v + scores.mean()


def shared(x: Tensor, mask: Tensor) -> Tensor:
    """Keys that also gate: their rows of padding are read by those of other tokens."""
    q, k, v = heads(x)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=additive(mask))
    return mixed * k.mean(dim=2, keepdim=True)


@pytest.mark.parametrize(
    "fn", [fused, written_out, scaled_later, capped, sinks, batched], ids=lambda fn: fn.__name__
)
def test_attention_that_hides_padding(fn: Function) -> None:
    x, labels = random(BATCH, LENGTH, WIDTH), labels_of()
    assert proves(fn, x, SHOWN, labels)
    other = torch.where(SHOWN[..., None], x, 7 * random(BATCH, LENGTH, WIDTH, seed=4))
    expected, got = (loss_of(fn, v, SHOWN, labels) for v in (x, other))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "fn",
    [unmasked, causal, masked_queries, masked_after, read_beside, shared],
    ids=lambda fn: fn.__name__,
)
def test_attention_that_reads_padding(fn: Function) -> None:
    assert not proves(fn, random(BATCH, LENGTH, WIDTH), SHOWN, labels_of())


@pytest.mark.parametrize("name", NOT_HIDING)
def test_masks_that_do_not_hide_padding(name: str) -> None:
    fn = written_with(NOT_HIDING[name])
    assert not proves(fn, random(BATCH, LENGTH, WIDTH), SHOWN, labels_of())


@pytest.mark.parametrize(("samples", "length"), [(1, 1), (1, 2), (5, 2), (4, 3), (2, 17), (9, 64)])
def test_batches_that_masks_are_computed_for(samples: int, length: int) -> None:
    batches = list(mask_values._paddings(torch.ones(samples, length)))
    assert len(batches) == 4
    for shown in batches:
        assert shown.shape == (samples, length) and bool(shown.any(dim=1).all())
        assert length == 1 or not bool(shown.all(dim=1).any())
    right, left, *_ = batches
    assert bool(right[:, 0].all()) and bool(left[:, -1].all())


HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1 - mask": lambda s, m: s + (1.0 - m[:, None, None, :].double()) * -10000.0,
    "where": lambda s, m: torch.where(m[:, None, None, :] & EARLIER, s, -torch.inf),
    "positions too": lambda s, m: (s + positions(m)) / 8 + additive(m),
    "filled in place": lambda s, m: s + additive(m).masked_fill(EARLIER.mT & ~EARLIER, -1e30),
}


@pytest.mark.parametrize("name", HIDING)
def test_masks_that_hide_padding(name: str) -> None:
    assert proves(written_with(HIDING[name]), random(BATCH, LENGTH, WIDTH), SHOWN, labels_of())


def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, WORDS), targets.reshape(-1), **options)


OWN = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
# (loss of logits [B, L, WORDS] and labels, whether the model is taken to predict the next token)
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool, bool]] = {
    "next token": (lambda z, y: cross_entropy(z[:, :-1], y[:, 1:]), True, True),
    "next token, padded": (
        lambda z, y: cross_entropy(z, F.pad(y, (0, 1), value=-100)[..., 1:]), True, True,
    ),
    "this token": (lambda z, y: cross_entropy(z, y), False, True),
    "no mean": (lambda z, y: cross_entropy(z, y, reduction="none").sum(), False, True),
    "smoothed": (lambda z, y: cross_entropy(z, y, label_smoothing=0.1), False, True),
    "and logits": (lambda z, y: (cross_entropy(z, y), z), False, True),
    "and flattened logits": (lambda z, y: (cross_entropy(z, y), z.view(-1, WORDS)), False, True),
    "another shift": (lambda z, y: cross_entropy(z, y), True, False),
    "two tokens on": (lambda z, y: cross_entropy(z[:, :-2], y[:, 2:]), True, False),
    "own targets": (lambda z, y: cross_entropy(z, OWN), False, False),
    "clamped": (lambda z, y: cross_entropy(z, y.clamp(min=0)), False, False),
    "padded with 0": (lambda z, y: cross_entropy(z, F.pad(y, (0, 1))[..., 1:]), True, False),
    "another number ignored": (
        lambda z, y: cross_entropy(z, y.where(y >= 0, 1), ignore_index=1), False, False,
    ),
    "probabilities": (
        lambda z, y: cross_entropy(z, y) + F.cross_entropy(z.mT, z.detach().mT.softmax(1)),
        False, False,
    ),
    "and a mean": (lambda z, y: cross_entropy(z, y) + z.square().mean(), False, False),
    "and one number": (lambda z, y: (cross_entropy(z, y), z.mean()[None]), False, False),
    "and one a sample": (lambda z, y: (cross_entropy(z, y), z.mean((1, 2))), False, False),
    "and a pooled token": (lambda z, y: (cross_entropy(z, y), z[:, 0]), False, False),
    "and mixed rows": (lambda z, y: (cross_entropy(z, y), z.cumsum(1)), False, False),
    "mixed rows alone": (lambda z, y: z.cumsum(1), True, False),
    "rows alone": (lambda z, y: z * 2, True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_graph_returns(name: str) -> None:
    loss, shift, expected = LOSSES[name]

    def call(x: Tensor, labels: Tensor, attention_mask: Tensor) -> Any:
        return loss(F.linear(x, HEAD), labels), attention_mask & True, labels + 1

    labels = labels_of()
    gm, inputs = captured(call, random(BATCH, LENGTH, WIDTH), labels, SHOWN)
    arguments = {"attention_mask": SHOWN, "labels": labels}
    placeholders = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
    proof = padding_proof._Proof(gm, inputs, placeholders["L_attention_mask_"], arguments, shift)
    needs = dict(zip(placeholders, proof.read(gm, None), strict=True))
    assert (needs["L_x_"] == LiveRows(0, 1, REAL)) is expected
