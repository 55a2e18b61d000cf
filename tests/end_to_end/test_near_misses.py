"""Almost a region: what would be mis-sliced stays dense and says why, what is right is sliced.

Every case, sliced or dense, must equal its masked eager self with whatever channels were recorded.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.graph.pointwise import is_pointwise
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


class Attention(nn.Module):
    """Four heads on two kv heads; ``body`` gets the heads and returns the output."""

    heads, kv_heads, dim = 4, 2, 6

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q = Adapted(WIDTH, self.heads * self.dim)
        self.k = Adapted(WIDTH, self.kv_heads * self.dim)
        self.v = Adapted(WIDTH, self.kv_heads * self.dim)
        self.o = Adapted(self.heads * self.dim, WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.body(self, x, q, k, v)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- dense, with a reason


def hidden_returned(net: Any, x: Tensor) -> Any:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h), h


def producer_returned(net: Any, x: Tensor) -> Any:
    a = net.a(x)
    return net.out(F.silu(a) * net.b(x)), a


def hidden_summed(net: Any, x: Tensor) -> Any:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h) + h.sum(-1, keepdim=True)


def weight_used_twice(net: Any, x: Tensor) -> Tensor:
    return net.a(net.out(F.silu(net.a(x)) * net.b(x)))


def weight_used_twice_side_by_side(net: Any, x: Tensor) -> Tensor:
    return net.out(net.a(x) * torch.sigmoid(net.a(x.flip(1))) + net.b(x))


def consumer_used_twice(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x))) + net.out(F.silu(net.b(x)))


def channels_reversed(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x)).flip(-1) * net.b(x))


def channels_rolled(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x)).roll(1, -1) * net.b(x))


def channels_sorted(net: Any, x: Tensor) -> Tensor:
    return net.out(net.a(x).sort(-1).values + net.b(x))


def channels_summed_up(net: Any, x: Tensor) -> Tensor:
    return net.out(net.a(x).cumsum(-1) * net.b(x))


def softmax_over_channels(net: Any, x: Tensor) -> Tensor:
    return net.out(net.a(x).softmax(-1) * net.b(x))


def mixed_by_a_matrix(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.out(torch.matmul(h.transpose(1, 2), h).mean(1, keepdim=True) * net.b(x))


def tokens_and_channels_swapped(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h.transpose(1, 2).reshape(h.shape))


def reshaped_across_tokens(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h.reshape(h.shape[0], HIDDEN, h.shape[1]).transpose(1, 2))


DENSE = [
    hidden_returned,
    producer_returned,
    hidden_summed,
    weight_used_twice,
    consumer_used_twice,
    channels_reversed,
    channels_rolled,
    channels_summed_up,
    softmax_over_channels,
    mixed_by_a_matrix,
    tokens_and_channels_swapped,
    reshaped_across_tokens,
]


@pytest.mark.parametrize("body", DENSE)
def test_stays_dense_and_says_why(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert record.sites == {}, table
    why = reasons(table)
    assert set(why) == {"a.base", "b.base", "out.base"}, table
    assert all(why.values()), table


def test_the_reason_names_the_reader() -> None:
    _, table = check(lambda: Net(hidden_returned))
    assert "also read by the graph's output" in reasons(table)["out.base"]
    _, table = check(lambda: Net(weight_used_twice))
    assert "more than once" in reasons(table)["a.base"]


def test_a_weight_whose_module_is_not_called_is_dense_and_says_so() -> None:
    """As the output projection of `nn.MultiheadAttention`: no hook of its module runs."""
    record, table = check(lambda: Net(lambda net, x: plain(net, x) @ net.a.base.weight.t()))
    assert "more than once" in reasons(table)["a.base"]
    used_only = lambda net, x: net.out(F.silu(F.linear(x, net.a.base.weight)) * net.b(x))  # noqa: E731
    record, table = check(lambda: Net(used_only))
    assert record.sites == {}, table
    assert "its module did not run" in reasons(table)["a.base"], table


def test_a_single_vector_is_dense_and_says_why() -> None:
    record, table = check(lambda: Net(lambda net, x: plain(net, x[0, 0])))
    assert record.sites == {}, table
    assert all("single vector" in why for why in reasons(table).values()), table


def break_after_producers(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    torch._dynamo.graph_break()
    return net.out(h)


def break_between_producers(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    torch._dynamo.graph_break()
    return net.out(F.silu(a) * net.b(x))


@pytest.mark.parametrize("body", [break_after_producers, break_between_producers])
def test_a_graph_break_inside_a_region_leaves_it_dense(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert record.sites == {}, table
    assert set(reasons(table)) == {"a.base", "b.base", "out.base"}, table


# ---------------------------------------------------------------- in place: dense or right


def hidden_scaled_in_place(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x))
    h.mul_(net.b(x))
    return net.out(h)


def hidden_added_to(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x))
    h += net.b(x)
    return net.out(h)


def activation_in_place(net: Any, x: Tensor) -> Tensor:
    return net.out(F.relu(net.a(x), inplace=True) * net.b(x))


def dropout_in_place(net: Any, x: Tensor) -> Tensor:
    return net.out(F.dropout(F.silu(net.a(x)) * net.b(x), 0.3, True, True))


def hidden_changed_through_a_view(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    h.view(-1, HIDDEN).add_(1.5)
    return net.out(h)


def producer_changed_through_a_view(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    a.view(-1).mul_(3.0)
    return net.out(F.silu(a) * net.b(x))


def hidden_assigned_to(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    h[..., :7] = 0.25
    return net.out(h)


def hidden_assigned_to_by_token(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    h[:, 0] = 1.0
    return net.out(h)


def input_changed_between(net: Any, x: Tensor) -> Tensor:
    """The second producer reads another input than the first, under the same name."""
    x = x * 1.0
    a = net.a(x)
    x.mul_(-2.0)
    return net.out(F.silu(a.detach()) * net.b(x))


def written_to_a_buffer(net: Any, x: Tensor) -> Tensor:
    h = torch.empty(*x.shape[:-1], HIDDEN, dtype=x.dtype)
    h.copy_(F.silu(net.a(x)) * net.b(x))
    return net.out(h)


IN_PLACE = [
    hidden_scaled_in_place,
    hidden_added_to,
    activation_in_place,
    dropout_in_place,
    hidden_changed_through_a_view,
    producer_changed_through_a_view,
    hidden_assigned_to,
    hidden_assigned_to_by_token,
    input_changed_between,
    written_to_a_buffer,
]


@pytest.mark.parametrize("body", IN_PLACE)
def test_in_place_is_dense_with_a_reason_or_right(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert len(record.sites) + len([why for why in reasons(table).values() if why]) == 3, table


# ---------------------------------------------------------------- sliced


def unusual_function(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.out(torch.tanh(a) * torch.sigmoid(1.7 * b) + b**2)


def piecewise_function(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.out(torch.where(a > 0, a, 0.1 * b).clamp(-2, 2).abs())


def scaled_per_channel(net: Any, x: Tensor) -> Tensor:
    return net.out(F.gelu(net.a(x)) * net.b(x) * net.scale)


def scaled_per_token(net: Any, x: Tensor) -> Tensor:
    return net.out(F.gelu(net.a(x)) * net.b(x) * x[..., :1])


def different_inputs(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x)) * net.b(x.sin()))


SLICED = [plain, unusual_function, piecewise_function, scaled_per_channel]


@pytest.mark.parametrize("body", SLICED)
def test_any_pointwise_function_is_sliced(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert set(record.sites) == {"a.base", "b.base", "out.base"}, table
    assert len(record.selections[""]["ffn"]) == 16


# ---------------------------------------------------------------- right, sliced or not


def residual_at_full_width(net: Any, x: Tensor) -> Tensor:
    wide = F.pad(x, (0, HIDDEN - WIDTH))
    return net.out(F.silu(net.a(x)) * net.b(x) + wide)


def normalised_hidden(net: Any, x: Tensor) -> Tensor:
    return net.out(F.layer_norm(F.silu(net.a(x)) * net.b(x), (HIDDEN,), net.scale))


def normalised_by_hand(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))


def dropped_hidden(net: Any, x: Tensor) -> Tensor:
    return net.out(F.dropout(F.silu(net.a(x)) * net.b(x), 0.3))


def channels_compared_across_tokens(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h - h.mean(1, keepdim=True))


def tokens_shifted(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h + F.pad(h[:, :-1], (0, 0, 1, 0)))


def hidden_of_last_token_only(net: Any, x: Tensor) -> Tensor:
    return net.out((F.silu(net.a(x)) * net.b(x))[:, -1:])


def random_noise_on_hidden(net: Any, x: Tensor) -> Tensor:
    h = F.silu(net.a(x)) * net.b(x)
    return net.out(h + 0.1 * torch.randn_like(h))


def squared_producer(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    return net.out(a * a + net.b(x))


def one_producer_detached(net: Any, x: Tensor) -> Tensor:
    return net.out(net.a(x).detach() * net.b(x))


def chained(net: Any, x: Tensor) -> Tensor:
    y = plain(net, x)
    return y + F.silu(y)


EITHER = [
    weight_used_twice_side_by_side,
    channels_sorted,
    scaled_per_token,
    different_inputs,
    residual_at_full_width,
    normalised_hidden,
    normalised_by_hand,
    dropped_hidden,
    channels_compared_across_tokens,
    tokens_shifted,
    hidden_of_last_token_only,
    random_noise_on_hidden,
    squared_producer,
    one_producer_detached,
    chained,
]


@pytest.mark.parametrize("body", EITHER)
def test_sliced_or_dense_it_equals_its_masked_self(body: Any) -> None:
    record, table = check(lambda: Net(body))
    assert len(record.sites) + len([why for why in reasons(table).values() if why]) == 3, table


def halves(net: Any, x: Tensor) -> Tensor:
    gate, up = net.a(x).chunk(2, -1)
    return net.out(F.silu(gate) * up) + net.b(x).sum(-1, keepdim=True)


def swapped_halves(net: Any, x: Tensor) -> Tensor:
    up, gate = net.a(x).split(HIDDEN // 2, -1)
    return net.out(F.silu(gate) * up)


def interleaved(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.out(F.silu(h[..., ::2]) * h[..., 1::2])


def overlapping(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.out(F.silu(h[..., :20]) * h[..., 10:30])


def one_half_only(net: Any, x: Tensor) -> Tensor:
    return net.out(F.silu(net.a(x)[..., : HIDDEN // 2]))


def halves_of_two(net: Any, x: Tensor) -> Tensor:
    half = HIDDEN // 2
    return net.out(F.silu(net.a(x)[..., :half]) * net.b(x)[..., half:])


@pytest.mark.parametrize(
    "body", [halves, swapped_halves, interleaved, overlapping, one_half_only, halves_of_two]
)
def test_fused_projections(body: Any) -> None:
    record, table = check(lambda: Net(body, inner=HIDDEN // 2))
    if body in (halves, swapped_halves, interleaved):
        assert {"a.base", "out.base"} <= set(record.sites), table
    else:
        assert record.sites == {}, table


# ---------------------------------------------------------------- attention


def usual(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(net.mix(q, k, v))


def fed_by_the_input(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(x) + net.mix(q, k, v)


def gated_output(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(net.mix(q, k, v) * torch.sigmoid(x))


def residual_before_output(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(net.mix(q, k, v) + x)


def values_also_returned(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return net.o(net.mix(q, k, v)), v


def scores_also_read(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(net.mix(q, k, v)) * k.square().mean()


def heads_merged_the_wrong_way(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = net.mix(q, k, v)
    return net.o(mixed.unflatten(-1, (net.heads, net.dim)).transpose(2, 3).flatten(2))


def values_also_a_key(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(net.mix(q, v, v)) + k.mean()


def heads_grouped_the_other_way(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat(1, 2, 1, 1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return net.o(mixed.transpose(1, 2).flatten(2))


def keys_changed_in_place(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k[:, 0].mul_(2.0)
    return net.o(net.mix(q, k, v))


def written_out(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1)
    return net.o((weights @ v).transpose(1, 2).flatten(2))


def softmax_over_queries(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    weights = (q @ k.transpose(-1, -2)).softmax(-2)
    return net.o((weights @ v).transpose(1, 2).flatten(2))


ATTENTIONS: dict[Any, bool | None] = {
    usual: True,
    written_out: True,
    fed_by_the_input: False,
    values_also_returned: False,
    scores_also_read: False,
    heads_merged_the_wrong_way: False,
    values_also_a_key: False,
    gated_output: None,
    residual_before_output: None,
    heads_grouped_the_other_way: None,
    keys_changed_in_place: None,
    softmax_over_queries: None,
}


@pytest.mark.parametrize("body", list(ATTENTIONS))
def test_attention(body: Any) -> None:
    record, table = check(lambda: Attention(body), 0.5)
    sliced = ATTENTIONS[body]
    if sliced is not None:
        assert bool(record.sites) == sliced, table
    assert len(record.sites) + len([why for why in reasons(table).values() if why]) == 4, table


class BranchByHead(nn.Module):
    """The query's LoRA branch is added after the heads are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q = Adapted(WIDTH, WIDTH)
        self.k, self.v, self.o = (Adapted(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.q.down)
        q = self.q.base(x).unflatten(-1, (4, 6)) + F.linear(low, self.q.up).unflatten(-1, (4, 6))
        k, v = (layer(x).unflatten(-1, (4, 6)) for layer in (self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_branch_added_head_by_head_is_cut_with_its_site() -> None:
    model, x = build(BranchByHead)
    plan = oracle.plan_of(0.5)
    options = {"backend": "aot_eager", "lora_branch": "sparse"}
    slx.compile(model, oracle.estimator_of(model), plan=plan, **options)
    with slx.record(model) as record:
        got = step(model, x)
    slx.restore(model)
    assert len(record.sites) == 4
    for name in ("q", "k", "v", "o"):
        layer, (role, chosen) = model.get_submodule(name), record.sites[f"{name}.base"]
        part = layer.up if role == "out" else layer.down
        mask = torch.zeros(WIDTH).index_fill_(0, chosen, 1)
        with torch.no_grad():
            part.mul_(mask[:, None] if role == "out" else mask)
    with oracle.masked_reference(model, record):
        expected = step(model, x)
    assert abs(float(got.loss - expected.loss)) <= 1e-9


def test_a_call_that_tiny_shapes_do_not_allow_is_not_pointwise() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(2, 9, 144)
    part = graph.call_method("narrow", (x, -1, 72, 72))
    part.meta["example_value"] = torch.randn(2, 9, 72)
    assert not is_pointwise(part)
