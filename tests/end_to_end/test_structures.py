"""Structures beyond the plain FFN and attention, written by hand: what is sliced, and that it
equals its masked eager self (`adapted_nets.check` compares both)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import HIDDEN, WIDTH, Net, build, check, step
from tests.support.attention_nets import DIM, HEADS, KV, Block, attend, attention, heads, merged

# ---------------------------------------------------------------- gated attention


def gated(net: Any, x: Tensor) -> Tensor:
    mixed = merged(attend(heads(net.q(x)), heads(net.k(x)), heads(net.v(x))))
    return net.o(mixed * torch.sigmoid(net.gate(x)))


def gated_by_half_of_the_query(net: Any, x: Tensor) -> Tensor:
    q, gate = net.q(x).unflatten(-1, (HEADS, 2 * DIM)).chunk(2, -1)
    mixed = merged(attend(q.transpose(1, 2), heads(net.k(x)), heads(net.v(x))))
    return net.o(mixed * torch.sigmoid(gate.flatten(2)))


def gated_by_head(net: Any, x: Tensor) -> Tensor:
    mixed = attend(heads(net.q(x)), heads(net.k(x)), heads(net.v(x))).transpose(1, 2)
    return net.o((mixed * torch.sigmoid(net.gate(x))[..., None]).flatten(2))


def test_a_gate_of_the_attention_output_is_sliced_with_the_values() -> None:
    record, table = check(attention(gated, gate=HEADS * DIM), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"} | {"gate.base"}, table
    assert torch.equal(record.sites["gate.base"][1].sort()[0], record.sites["o.base"][1].sort()[0])


def test_a_gate_fused_with_the_queries() -> None:
    record, table = check(attention(gated_by_half_of_the_query, q=2 * HEADS * DIM), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table
    assert len(record.sites["q.base"][1]) == HEADS * DIM


def test_a_gate_of_one_value_a_head_stays_dense() -> None:
    record, table = check(attention(gated_by_head, gate=HEADS), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table


# ---------------------------------------------------------------- low-rank keys and values

NOPE, ROPE, RANK = 6, 4, 8


def low_rank(net: Any, x: Tensor, *, fill: str) -> Tensor:
    q_nope, q_rope = heads(net.qb(F.rms_norm(net.qa(x), (RANK,))), NOPE + ROPE).split(
        (NOPE, ROPE), -1
    )
    latent, k_rope = net.kva(x).split((RANK, ROPE), -1)
    k_nope, v = heads(net.kvb(F.rms_norm(latent, (RANK,))), NOPE + DIM).split((NOPE, DIM), -1)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.3
    q_rope = q_rope * angle.cos() + q_rope.roll(1, -1) * angle.sin()
    k_rope = heads(k_rope, ROPE)
    k_rope = (k_rope * angle.cos() + k_rope.roll(1, -1) * angle.sin()).expand_as(q_rope)
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope), -1)
    if fill.startswith("copy"):
        k = k_nope.new_empty(*k_nope.shape[:-1], NOPE + ROPE)
        k[..., :NOPE].copy_(k_nope)
        k[..., NOPE:].copy_(k_rope)
    elif fill == "assign":
        k = torch.empty_like(q)
        k[..., NOPE:] = k_rope
        k[..., :NOPE] = k_nope
    if fill.endswith("matmul"):  # here the first reader of the filled buffer is a method
        weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1)
        return net.o(merged(weights @ v))
    return net.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@pytest.mark.parametrize("fill", ["cat", "copy", "assign", "matmul", "copy, matmul"])
def test_low_rank_keys_and_values(fill: str) -> None:
    widths = {
        "qa": RANK, "qb": HEADS * (NOPE + ROPE), "kva": RANK + ROPE, "kvb": HEADS * (NOPE + DIM),
        "o": WIDTH,
    }  # fmt: skip
    reads = {"qb": RANK, "kvb": RANK, "o": HEADS * DIM}
    record, table = check(
        lambda: Block(widths, lambda net, x: low_rank(net, x, fill=fill), reads), 0.5
    )
    assert set(record.sites) == {"qb.base", "kvb.base", "o.base"}, table
    rotary = [h * (NOPE + ROPE) + NOPE + i for h in range(HEADS) for i in range(ROPE)]
    assert set(rotary) <= set(record.sites["qb.base"][1].tolist()), "rotary rows are always kept"
    assert len(record.sites["qb.base"][1]) == HEADS * NOPE // 2 + len(rotary)


def read_between(net: Any, x: Tensor) -> Tensor:
    h = torch.empty(*x.shape[:-1], HIDDEN, dtype=x.dtype)
    h[..., :20] = F.silu(net.a(x))[..., :20]
    seen = h[..., :20].sum()
    h[..., 20:] = net.b(x)[..., 20:]
    return net.out(h) * seen


def written_twice(net: Any, x: Tensor) -> Tensor:
    h = torch.empty(*x.shape[:-1], HIDDEN, dtype=x.dtype)
    h[..., :30] = F.silu(net.a(x))[..., :30]
    h[..., 20:] = net.b(x)[..., 20:]
    return net.out(h)


def source_changed_between(net: Any, x: Tensor) -> Tensor:
    a = F.silu(net.a(x)) * 1.0
    h = torch.empty(*x.shape[:-1], HIDDEN, dtype=x.dtype)
    h[..., :20] = a[..., :20]
    a.mul_(3.0)
    h[..., 20:] = a[..., 20:] + net.b(x)[..., 20:]
    return net.out(h)


@pytest.mark.parametrize("body", [read_between, written_twice, source_changed_between])
def test_a_buffer_that_is_no_concatenation_stays_right(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert record.sites == {}, table


# ---------------------------------------------------------------- other attentions


def with_sinks(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.4
    sinks = net.sinks[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat((scores, sinks), -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return net.o(merged(scores.softmax(-1)[..., :-1] @ v))


def with_scaled_sinks(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.4
    total = torch.logsumexp(scores, -1, keepdim=True)
    scale = torch.sigmoid(total - net.sinks[:, None, None])
    return net.o(merged(scores.softmax(-1) @ v * scale))


def soft_capped(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) / 5.0) * 5.0
    return net.o(merged(scores.softmax(-1) @ v))


def masked_in_place(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2)
    scores /= DIM**0.5
    scores += net.sinks[:, None, None] * torch.arange(x.shape[1])  # ALiBi
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores.masked_fill_(ahead, torch.finfo(scores.dtype).min)
    scores = scores / 4
    scores = (scores - scores.amax(-1).unsqueeze(-1)) * 4
    return net.o(merged(scores.softmax(-1) @ v))


def with_learned_keys(net: Any, x: Tensor) -> Tensor:
    """Keys and values of no token beside the tokens' own, as in prefix tuning."""
    q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
    learned = net.sinks[None, :KV, None, None].expand(len(x), -1, 3, DIM)
    k, v = (torch.cat((learned, t), dim=2) for t in (k, v))
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    return net.o(merged(F.scaled_dot_product_attention(q, k, v)))


@pytest.mark.parametrize(
    "body",
    [
        with_sinks,
        with_scaled_sinks,
        soft_capped,
        masked_in_place,
        with_learned_keys,
    ],
)
def test_scores_may_take_any_way_to_the_mix(body: Any) -> None:
    record, table = check(attention(body), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table


def glu() -> nn.Module:
    widths = {"ab": 2 * HIDDEN, "out": WIDTH}
    return Block(widths, lambda net, x: net.out(F.glu(net.ab(x))), {"out": HIDDEN})


def test_a_gated_linear_unit_of_one_projection() -> None:
    record, table = check(glu, 0.5)
    assert set(record.sites) == {"ab.base", "out.base"}, table


def test_a_gated_linear_unit_stays_as_it_is_without_sparsity() -> None:
    model, x = build(glu)
    model.__dict__["forward"] = torch.compile(model.forward, backend="aot_eager")
    expected = step(model, x)
    del model.__dict__["forward"]
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.0), backend="aot_eager")
    oracle.assert_identical(step(model, x), expected)


def test_heads_in_groups_of_a_fused_projection() -> None:
    """Two groups, each with two query, two value and two key heads (in that order)."""

    def body(net: Any, x: Tensor) -> Tensor:
        parts = net.qkv(x).unflatten(-1, (2, 6 * DIM)).split(2 * DIM, -1)
        q, v, k = (p.unflatten(-1, (2, DIM)).flatten(2, 3).transpose(1, 2) for p in parts)
        return net.o(merged(F.scaled_dot_product_attention(q, k, v)))

    widths = {"qkv": 3 * HEADS * DIM, "o": WIDTH}
    record, table = check(lambda: Block(widths, body, {"o": HEADS * DIM}), 0.5)
    assert set(record.sites) == {"qkv.base", "o.base"}, table
    columns = record.sites["o.base"][1]
    values = columns // (2 * DIM) * 6 * DIM + 2 * DIM + columns % (2 * DIM)
    assert set(values.tolist()) <= set(record.sites["qkv.base"][1].tolist())


# ---------------------------------------------------------------- order


def parameter_after_producers(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.out(F.silu(a) * b * F.softplus(net.scale))


def second_input_after_first_producer(net: Any, x: Tensor) -> Tensor:
    a = F.silu(net.a(x))
    return net.out(a * net.b(F.layer_norm(x, (WIDTH,))))


@pytest.mark.parametrize("body", [parameter_after_producers, second_input_after_first_producer])
def test_what_the_predictor_reads_may_come_late(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert set(record.sites) == {"a.base", "b.base", "out.base"}, table


def random_before_late_input(net: Any, x: Tensor) -> Tensor:
    a = F.dropout(net.a(x), 0.4)
    return net.out(a * net.b(F.dropout(x, 0.4)))


def written_before_late_input(net: Any, x: Tensor) -> Tensor:
    scale = torch.ones(WIDTH, dtype=x.dtype)
    a = net.a(x)
    scale[:7].mul_(0.5)
    return net.out(F.silu(a) * net.b(x * scale))


@pytest.mark.parametrize("body", [random_before_late_input, written_before_late_input])
def test_random_draws_and_writes_keep_their_order(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert record.sites == {}, table
    assert "computed after its first producer" in table


# ---------------------------------------------------------------- functions with their own backward


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))


def own_pointwise(net: Any, x: Tensor) -> Tensor:
    return net.out(Swish.apply(net.a(x)) * net.b(x))


def own_mixing(net: Any, x: Tensor) -> Tensor:
    return net.out(Softmax.apply(net.a(x)) * net.b(x))


def test_a_pointwise_function_with_its_own_backward_is_sliced() -> None:
    record, table = check(lambda: Net(own_pointwise))
    assert set(record.sites) == {"a.base", "b.base", "out.base"}, table


def test_a_function_that_mixes_channels_stays_dense() -> None:
    record, table = check(lambda: Net(own_mixing))
    assert record.sites == {}, table
