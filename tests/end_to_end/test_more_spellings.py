"""Structures that are sliced in every way of writing them, beside near misses that stay dense.

Each equals its masked eager self (`adapted_nets.check`), loss and gradients, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import (
    HIDDEN,
    WIDTH,
    Adapted,
    Net,
    build,
    check,
    plain,
    reasons,
    step,
)
from tests.support.attention_nets import DIM, HEADS, KV, attend, attention, heads, merged

ALL = {"a.base", "b.base", "out.base"}
Body = Callable[[Any, Tensor], Tensor]


def gated(function: Callable[[Tensor], Tensor]) -> Body:
    return lambda net, x: net.out(function(net.a(x)) * net.b(x))


def hidden(function: Callable[[Any, Tensor], Tensor]) -> Body:
    return lambda net, x: net.out(function(net, F.silu(net.a(x)) * net.b(x)))


# ---------------------------------------------------------------- functions

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.2, dtype=x.dtype)),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu in place": lambda x: F.rrelu(x, training=True, inplace=True),
    "rrelu, evaluated": F.rrelu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": torch.relu_,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "where": lambda x: torch.where(x > 0, x, torch.full_like(x, -0.3)),
    "transposed": lambda x: F.silu(x.mT).mT,
    "permuted": lambda x: torch.tanh(F.silu(x.permute(2, 0, 1)) * 2).permute(1, 2, 0),
    "halves": lambda x: torch.cat(F.silu(x).chunk(2, -1), -1),
    "halves swapped": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "function of halves": lambda x: torch.cat([F.silu(part) for part in x.chunk(2, -1)], -1),
}


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_functions_of_a_gated_hidden_state(function: str) -> None:
    record, table = check(lambda: Net(gated(FUNCTIONS[function])))
    assert set(record.sites) == ALL, table


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "prelu by token": lambda x: F.prelu(x, torch.linspace(0, 1, x.shape[1], dtype=x.dtype)),
    "two functions of halves": lambda x: torch.cat(
        (F.silu(x.chunk(2, -1)[0]), F.gelu(x.chunk(2, -1)[1])), -1
    ),
    "transposed to another shape": lambda x: F.silu(x.mT).reshape(x.shape),
    "softmax in between": lambda x: x.mT.softmax(-2).mT,
}


@pytest.mark.parametrize("function", list(MIXING))
def test_functions_that_mix_channels_stay_dense_and_say_why(function: str) -> None:
    record, table = check(lambda: Net(gated(MIXING[function])))
    assert record.sites == {} and all(reasons(table).values()), table


# ---------------------------------------------------------------- in place


def scaled(net: Any, h: Tensor) -> Tensor:
    h *= net.scale
    return h


def shifted(net: Any, h: Tensor) -> Tensor:
    h += 0.5
    h *= 2.0
    return h


def of_an_old_value(net: Any, h: Tensor) -> Tensor:
    old = h * 0.3
    h.add_(1.5)
    return h + old


@pytest.mark.parametrize("function", [scaled, shifted, of_an_old_value])
def test_what_writes_in_place_is_a_function(function: Any) -> None:
    record, table = check(lambda: Net(hidden(function)))
    assert set(record.sites) == ALL, table


def through_a_view(net: Any, h: Tensor) -> Tensor:
    seen = h[..., :7]
    h.add_(1.5)
    return h + seen.sum(-1, keepdim=True)


def a_view_written(net: Any, h: Tensor) -> Tensor:
    h[..., :7].mul_(3.0)
    return h


@pytest.mark.parametrize("function", [through_a_view, a_view_written])
def test_what_others_see_changed_stays_right(function: Any) -> None:
    record, table = check(lambda: Net(hidden(function)))
    assert len(record.sites) + len(reasons(table)) == 3, table


# ---------------------------------------------------------------- weights


class Kept(nn.Module):
    """A frozen matrix of a layer written by hand, stored [K, N] or [N, K]."""

    def __init__(self, k: int, n: int, product: Callable[..., Tensor], *, kn: bool) -> None:
        super().__init__()
        weight = torch.randn(k, n) / k**0.5
        self.kn = kn
        self.weight = nn.Parameter(weight if kn else weight.t().contiguous(), requires_grad=False)
        self.product = product
        self.down = nn.Parameter(torch.randn(k, 3) * 0.2)
        self.up = nn.Parameter(torch.randn(3, n) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight) + x @ self.down @ self.up


PRODUCTS: dict[str, tuple[bool, Callable[..., Tensor]]] = {
    "tensordot": (True, lambda x, w: torch.tensordot(x, w, dims=([2], [0]))),
    "tensordot, 1": (True, lambda x, w: torch.tensordot(x, w, 1)),
    "tensordot, [N, K]": (False, lambda x, w: torch.tensordot(x, w, dims=([-1], [1]))),
    "bmm": (True, lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1))),
    "bmm, unsqueezed": (True, lambda x, w: torch.bmm(x, w[None].expand(len(x), -1, -1))),
    "bmm, [N, K]": (False, lambda x, w: torch.bmm(x, w.t().expand(x.shape[0], -1, -1))),
    "channels first": (False, lambda x, w: (w @ x.mT).mT),
    "channels first, [K, N]": (True, lambda x, w: (w.t() @ x.transpose(1, 2)).transpose(1, 2)),
    "flat": (True, lambda x, w: (x.flatten(0, 1) @ w).unflatten(0, x.shape[:2])),
}


@pytest.mark.parametrize("product", list(PRODUCTS))
def test_products_with_a_frozen_weight(product: str) -> None:
    kn, function = PRODUCTS[product]

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (Kept(WIDTH, HIDDEN, function, kn=kn) for _ in range(2))
            self.out = Kept(HIDDEN, WIDTH, function, kn=kn)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.silu(self.a(x)) * self.b(x))

    model, x = build(Three)
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.5), backend="eager")
    with slx.record(model) as record:
        got = step(model, x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert set(record.sites) == {"a", "b", "out"}, table
    for name, (role, kept) in record.sites.items():
        weight = model.get_submodule(name).weight
        axis = int((role == "out") == kn)
        mask = torch.zeros(weight.shape[axis]).index_fill_(0, kept, 1)
        weight.data *= mask if axis else mask[:, None]
    oracle.assert_close(got, step(model, x), 1e-9)


def test_a_product_over_another_dimension_stays_dense() -> None:
    mixing = nn.Parameter(torch.randn(7, 7, dtype=torch.float64), requires_grad=False)

    def body(net: Any, x: Tensor) -> Tensor:
        return net.out(F.silu(net.a(x)) * net.b(torch.tensordot(x, net.mixing, ([1], [0])).mT))

    def make() -> nn.Module:
        net = Net(body)
        net.mixing = mixing
        return net

    record, table = check(make)
    assert set(record.sites) <= ALL, table


# ---------------------------------------------------------------- rows of linears


def test_of_three_linears_in_a_row_two_are_sliced() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, HIDDEN)
            self.out = Adapted(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.silu(self.b(F.silu(self.a(x)))))

    record, table = check(Deep)
    assert set(record.sites) == {"a.base", "b.base"}, table
    assert "also belongs to another region" in reasons(table)["out.base"], table
    model, x = build(Deep)
    plan = oracle.plan_of({"b": 0.5, "out": 0.5})
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager")
    with slx.record(model) as record:
        step(model, x)
    assert set(record.sites) == {"b.base", "out.base"}, "the plan keeps the first region dense"


def two_halves(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h[..., : HIDDEN // 2]) + net.more(h[..., HIDDEN // 2 :])


def one_scaled_too(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h) + net.out(0.5 * h)


SHARED = [
    (two_halves, HIDDEN // 2, "rows of its producer are used by something else"),
    (one_scaled_too, HIDDEN, "would have to share one choice"),
]


@pytest.mark.parametrize(("body", "inner", "why"), SHARED, ids=["two halves", "scaled too"])
def test_two_products_of_one_hidden_state_stay_dense_and_say_why(
    body: Body, inner: int, why: str
) -> None:
    def make() -> nn.Module:
        net = Net(body, inner)
        net.more = Adapted(HIDDEN // 2, WIDTH) if body is two_halves else None
        return net

    record, table = check(make)
    assert record.sites == {} and why in reasons(table)["out.base"], table


def one_state(net: Any, x: Tensor) -> Any:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h), net.more(h)


def scaled_and_flat(net: Any, x: Tensor) -> Any:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h), net.more(0.5 * h.flatten(0, 1))


def two_functions(net: Any, x: Tensor) -> Any:
    a, b = net.a(x), net.b(x)
    return net.out(F.silu(a) * b), net.more(b * F.gelu(a))


@pytest.mark.parametrize("body", [one_state, scaled_and_flat, two_functions])
def test_out_projections_of_one_hidden_state_share_a_choice(body: Body) -> None:
    def make() -> nn.Module:
        net = Net(body)
        net.more = Adapted(HIDDEN, 12)
        return net

    record, table = check(make)
    assert set(record.sites) == ALL | {"more.base"}, table
    assert len({tuple(kept.tolist()) for _, kept in record.sites.values()}) == 1


def test_output_projections_of_one_attention_share_a_choice() -> None:
    def body(net: Any, x: Tensor) -> Any:
        q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
        mixed = merged(attend(q, k, v))
        return net.o(mixed), net.also(mixed)

    def make() -> nn.Module:
        net = attention(body)()
        net.also = Adapted(HEADS * DIM, 12)
        return net

    record, table = check(make, 0.5)
    assert set(record.sites) == {f"{n}.base" for n in (*"qkvo", "also")}, table


# ---------------------------------------------------------------- LoRA branches


class SliceAdded(Adapted):
    """The branch is added to a part of the output (the queries of a fused projection, say)."""

    share = 2

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.base(x), self.base.out_features // self.share
        y[..., :n] += F.linear(F.linear(x, self.down), self.up[:n])
        return y


class WholeSliceAdded(SliceAdded):
    share = 1


class TwoSlicesAdded(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y, n = self.base(x), self.base.out_features // 4
        y[:, :, :n] += F.linear(F.linear(x, self.down), self.up[:n])
        y[:, :, -n:] = y[:, :, -n:] + F.linear(F.linear(x, self.down), self.up[-n:])
        return y


class SomeTokens(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y, some = self.base(x), torch.arange(x.shape[1])[:, None] > 2
        return torch.where(some, y + F.linear(F.linear(x, self.down), self.up), y)


class OtherTokens(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y, some = self.base(x), torch.arange(x.shape[1])[:, None] > 2
        return torch.where(some, y, y + F.linear(F.linear(x, self.down), self.up))


def with_layers(layer: type[Adapted]) -> nn.Module:
    net = Net(plain)
    net.a, net.b, net.out = layer(WIDTH, HIDDEN), layer(WIDTH, HIDDEN), layer(HIDDEN, WIDTH)
    return net


BRANCHES = [SliceAdded, WholeSliceAdded, TwoSlicesAdded, SomeTokens, OtherTokens]


@pytest.mark.parametrize("layer", BRANCHES)
def test_branches_added_to_a_part(layer: type[Adapted]) -> None:
    record, table = check(lambda: with_layers(layer))
    assert set(record.sites) == ALL, table


@pytest.mark.parametrize("layer", BRANCHES)
def test_sparse_branches_added_to_a_part(layer: type[Adapted]) -> None:
    model, x = build(lambda: with_layers(layer))
    plan = oracle.plan_of(0.5)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", lora_branch="sparse")
    with slx.record(model) as record:
        got = step(model, x)
    slx.restore(model)
    assert set(record.sites) == ALL
    with torch.no_grad():
        for name, (role, kept) in record.sites.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            part = owner.up if role == "out" else owner.down
            mask = torch.zeros(part.shape[int(role == "in")]).index_fill_(0, kept, 1)
            part.mul_(mask[:, None] if role == "out" else mask)
    with oracle.masked_reference(model, record):
        expected = step(model, x)
    assert abs(float(got.loss - expected.loss)) <= 1e-9


class SliceReplaced(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y, n = self.base(x), self.base.out_features // 2
        y[..., :n] = F.linear(F.linear(x, self.down), self.up[:n])
        return y


class ReadBeforehand(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y, n = self.base(x), self.base.out_features // 2
        seen = y[..., :1]
        y[..., :n] += F.linear(F.linear(x, self.down), self.up[:n])
        return y + seen


@pytest.mark.parametrize("layer", [SliceReplaced, ReadBeforehand])
def test_what_is_no_addition_stays_right(layer: type[Adapted]) -> None:
    record, table = check(lambda: with_layers(layer))
    assert record.sites == {}, table


# ---------------------------------------------------------------- heads


def angles(t: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.arange(1, t.shape[-1] // 2 + 1, dtype=t.dtype)
    angle = torch.arange(t.shape[2], dtype=t.dtype)[:, None] * 0.3 / pairs
    return angle.cos(), angle.sin()


def rotated(t: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    cos, sin = angles(t)
    a, b = (t[..., ::2], t[..., 1::2]) if pairs == "interleaved" else t.chunk(2, -1)
    return a * cos - b * sin, a * sin + b * cos


def stacked(t: Tensor) -> Tensor:
    return torch.stack(rotated(t, "interleaved"), -1).flatten(-2)


def joined(t: Tensor) -> Tensor:
    return torch.cat(rotated(t, "half"), -1)


def filled(t: Tensor) -> Tensor:
    out = torch.empty_like(t)
    out[..., ::2], out[..., 1::2] = rotated(t, "interleaved")
    return out


def filled_by_halves(t: Tensor) -> Tensor:
    out = torch.empty_like(t)
    out[..., : DIM // 2], out[..., DIM // 2 :] = rotated(t, "half")
    return out


@pytest.mark.parametrize("rope", [stacked, joined, filled, filled_by_halves])
def test_rotary_embeddings(rope: Any) -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        q, k, v = heads(net.q(x)), heads(net.k(x)), heads(net.v(x))
        return net.o(merged(attend(rope(q), rope(k), v)))

    record, table = check(attention(body), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table


GROUPS = HEADS // KV
REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda t: t[:, torch.arange(HEADS) // GROUPS],
    "list": lambda t: t[:, [0, 0, 1, 1]],
    "repeat": lambda t: t.unsqueeze(2).repeat(1, 1, GROUPS, 1, 1).flatten(1, 2),
    "repeat, the other way": lambda t: t.repeat(1, GROUPS, 1, 1),
}


def repeated(repeat: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def body(net: Any, x: Tensor) -> Tensor:
        q, k, v = heads(net.q(x)), repeat(heads(net.k(x))), repeat(heads(net.v(x)))
        return net.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

    return attention(body)


@pytest.mark.parametrize("repeat", list(REPEATS))
def test_keys_and_values_of_several_queries(repeat: str) -> None:
    record, table = check(repeated(REPEATS[repeat]), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table


def test_an_index_of_uneven_groups_stays_dense() -> None:
    record, table = check(repeated(lambda t: t[:, [0, 0, 0, 1]]), 0.5)
    assert record.sites == {}, table


def test_an_index_that_the_model_holds_stays_dense_and_says_so() -> None:
    """Its numbers may differ from layer to layer, which share a graph."""

    def make() -> nn.Module:
        net = repeated(lambda t: t.index_select(1, index))()
        net.register_buffer("index", index)
        return net

    index = torch.tensor([0, 0, 1, 1])
    record, table = check(make, 0.5)
    assert record.sites == {}, table
    assert "index_select" in reasons(table)["o.base"], table


def by_chunks(net: Any, x: Tensor) -> Tensor:
    parts = (net.q(x), net.k(x), net.v(x))
    q, k, v = (torch.cat(t[:, None].chunk(t.shape[-1] // DIM, -1), 1) for t in parts)
    return net.o(torch.cat(attend(q, k, v).chunk(HEADS, 1), -1).squeeze(1))


def in_the_batch(net: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.cat(p(x).chunk(HEADS, -1), 0) for p in (net.q, net.k, net.v))
    return net.o(torch.cat(F.scaled_dot_product_attention(q, k, v).chunk(HEADS, 0), -1))


@pytest.mark.parametrize("body", [by_chunks, in_the_batch])
def test_heads_by_chunks(body: Any) -> None:
    widths = {} if body is by_chunks else {"k": HEADS * DIM, "v": HEADS * DIM}
    record, table = check(attention(body, **widths), 0.5)
    assert set(record.sites) == {f"{n}.base" for n in "qkvo"}, table


# ---------------------------------------------------------------- without sparsity


def every_spelling(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.a(x), inplace=True) * net.b(x)
    h *= torch.full_like(h, 0.7)
    h = F.rrelu(F.silu(h.mT).mT)
    y = net.out(torch.cat(h.chunk(2, -1), -1))
    y[..., :7] += x[..., :7]
    return torch.where(x > 0, y + x, y)


def test_nothing_is_respelled_without_sparsity() -> None:
    model, x = build(lambda: Net(every_spelling))
    model.__dict__["forward"] = torch.compile(model.forward, backend="aot_eager")
    expected = step(model, x)
    del model.__dict__["forward"]
    torch.compiler.reset()
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.0), backend="aot_eager")
    oracle.assert_identical(step(model, x), expected)
