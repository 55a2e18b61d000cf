"""Every op: schema, fake and derivative agree, values equal plain torch, no
unselected weight is ever read.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import sparselora_fx  # noqa: F401  (registers the ops and their derivatives)
from sparselora_fx.ir.ops import OPS

T, K, N, R = 5, 7, 11, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KEPT = [1, 4, "all"]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
}
NAN = float("nan")


def values(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    )


def chosen(width: int, kept: Any) -> Tensor:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    return order[: width if kept == "all" else kept].sort().values


def unchosen(width: int, idx: Tensor) -> Tensor:
    keep = torch.ones(width, dtype=torch.bool)
    keep[idx] = False
    return keep.nonzero().flatten()


TAKEN = torch.tensor([4, 1, -1])  # tokens of a [2, 3] grid; -1 is a row of zeros
OTHERS = torch.tensor([0, 5])
LISTED = torch.tensor([4, 1])


def inverse(idx: Tensor) -> Tensor:
    """Position in ``idx`` of each of the 2 x 3 tokens, -1 for those that are not in it."""
    pos = torch.full((6,), -1)
    for place, token in enumerate(idx.tolist()):
        if token >= 0:
            pos[token] = place
    return pos.view(2, 3)


def samples(dtype: torch.dtype, kept: Any, grad: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments for every op; the linears also with leading dimensions."""
    rows, columns = chosen(N, kept), chosen(K, kept)
    weight = values(N, K, dtype=dtype, grad=grad)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x3 = values(2, 3, K, dtype=dtype)
    return {
        "sliced_linear": (values(2, T, K, dtype=dtype, grad=grad), weight, rows),
        "sliced_linear_in": (values(2, T, len(columns), dtype=dtype, grad=grad), weight, columns),
        "sliced_linear_dgrad": (values(T, len(rows), dtype=dtype), weight.detach(), rows),
        "sliced_linear_in_dgrad": (values(T, N, dtype=dtype), weight.detach(), columns),
        "sliced_linear_wgrad": (
            values(T, len(rows), dtype=dtype),
            values(T, K, dtype=dtype),
            rows,
            N,
        ),
        "sliced_linear_in_wgrad": (
            values(T, N, dtype=dtype),
            values(T, len(columns), dtype=dtype),
            columns,
            K,
        ),
        "gather_channels": (values(2, T, N, dtype=dtype, grad=grad), rows),
        "scatter_channels": (values(2, T, len(rows), dtype=dtype, grad=grad), rows, N),
        "channel_rows": (chosen(8, 3), 4, 16, [0, 4, 8]),
        "topk_channels": (values(N, dtype=dtype), 4),
        "pool_tokens": (x3, mask),
        "gather_tokens": (values(2, 3, K, dtype=dtype, grad=grad), LISTED, inverse(LISTED)),
        "gather_or_zero_tokens": (values(2, 3, K, dtype=dtype, grad=grad), TAKEN, inverse(TAKEN)),
        "scatter_tokens": (values(3, K, dtype=dtype, grad=grad), TAKEN, inverse(TAKEN)),
        "scatter_two_lists": (
            values(3, K, dtype=dtype, grad=grad),
            values(2, K, dtype=dtype, grad=grad),
            TAKEN,
            inverse(TAKEN),
            OTHERS,
            inverse(OTHERS),
        ),
        "low_rank_norms": (x3, values(N, R, dtype=dtype), values(R, K, dtype=dtype), mask),
        "low_rank_linear": (values(2, 3, R, dtype=dtype), values(N, R, dtype=dtype)),
    }


NAMES = list(samples(torch.float64, 1, False))
DIFFERENTIABLE = ["sliced_linear", "sliced_linear_in", "gather_channels", "scatter_channels"]
DIFFERENTIABLE += ["gather_tokens", "gather_or_zero_tokens", "scatter_tokens", "scatter_two_lists"]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, name: str, kept: Any) -> None:
    opcheck(getattr(OPS, name).default, samples(dtype, kept, name in DIFFERENTIABLE)[name])


@pytest.mark.parametrize("name", ["pool_tokens", "low_rank_norms"])
def test_opcheck_without_token_weights(name: str) -> None:
    arguments = samples(torch.float32, 1, False)[name]
    opcheck(getattr(OPS, name).default, (*arguments[:-1], None))
    opcheck(getattr(OPS, name).default, (arguments[0].flatten(0, 1), *arguments[1:]))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, kept: Any) -> None:
    first, *rest = samples(torch.float64, kept, True)[name]
    if name.startswith("sliced"):
        weight, idx = rest
        call = getattr(OPS, name)
        assert torch.autograd.gradcheck(lambda x, w: call(x, w, idx), (first, weight))
        frozen = weight.detach()
        assert torch.autograd.gradcheck(lambda x: call(x, frozen, idx), (first,))
        assert torch.autograd.gradcheck(lambda w: call(first.detach(), w, idx), (weight,))
    elif name == "scatter_two_lists":
        second, *lists = rest
        listed = (lists[1] >= 0) | (lists[3] >= 0)  # the others pass no gradient on
        assert not bool(listed.all())
        assert torch.autograd.gradcheck(
            lambda y, z: OPS.scatter_two_lists(y, z, *lists)[listed], (first, second)
        )
    else:
        assert torch.autograd.gradcheck(lambda x: getattr(OPS, name)(x, *rest), (first,))


def plain(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """The documented meaning, in ordinary indexing."""
    x, y, *rest = arguments
    match name:
        case "sliced_linear":
            return torch.nn.functional.linear(x, y[rest[0]])
        case "sliced_linear_in":
            return torch.nn.functional.linear(x, y[:, rest[0]])
        case "sliced_linear_dgrad":
            return x @ y[rest[0]]
        case "sliced_linear_in_dgrad":
            return x @ y[:, rest[0]]
        case "sliced_linear_wgrad":
            full = x.new_zeros(rest[1], y.shape[1])
            full[rest[0]] = x.t() @ y
            return full
        case "sliced_linear_in_wgrad":
            full = x.new_zeros(x.shape[1], rest[1])
            full[:, rest[0]] = x.t() @ y
            return full
        case "gather_channels":
            return x[..., y]
        case "scatter_channels":
            full = x.new_zeros(*x.shape[:-1], rest[0])
            full[..., y] = x
            return full
        case "channel_rows":
            inner, stride, offsets = y, *rest
            return torch.tensor(
                [c // inner * stride + c % inner + o for o in offsets for c in x.tolist()]
            )
        case "gather_tokens":
            flat = x.flatten(0, 1)
            return torch.stack([flat[i] if i >= 0 else flat[y[0]] for i in y.tolist()])
        case "gather_or_zero_tokens":
            flat = x.flatten(0, 1)
            return torch.stack([flat[i] if i >= 0 else flat[0] * 0 for i in y.tolist()])
        case "scatter_tokens":
            flat = x.new_zeros(6, x.shape[-1])
            flat[y[y >= 0]] = x[y >= 0]
            return flat.view(2, 3, -1)
        case "scatter_two_lists":
            flat = x[:1].repeat(6, 1)
            for rows, idx in ((x, rest[0]), (y, rest[2])):
                flat[idx[idx >= 0]] = rows[idx >= 0]
            return flat.view(2, 3, -1)
        case "topk_channels":
            return x.argsort(descending=True)[:y].sort().values
        case "pool_tokens":
            return torch.stack([tokens[kept].mean(0) for tokens, kept in zip(x, y, strict=True)])
        case "low_rank_linear":
            return x @ y.t()
        case "low_rank_norms":
            b, mask = rest
            return (x[mask] @ b.t() @ y.t()).norm(dim=0)
    raise AssertionError(name)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_equal_plain_torch(dtype: torch.dtype, name: str, kept: Any) -> None:
    arguments = samples(dtype, kept, False)[name]
    got, expected = getattr(OPS, name)(*arguments), plain(name, arguments)
    if name != "low_rank_norms":
        assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, check_dtype=False, **TOLERANCE[dtype])


def test_scores_of_half_precision_are_wide() -> None:
    arguments = samples(torch.bfloat16, 1, False)["low_rank_norms"]
    assert OPS.low_rank_norms(*arguments).dtype == torch.float32


def test_a_token_weight_of_another_grid_counts_every_token() -> None:
    x = values(4, K)
    wrong = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(OPS.pool_tokens(x, wrong), x.mean(0, keepdim=True))


def test_pooling_a_sample_without_tokens_is_zero_not_nan() -> None:
    mask = torch.tensor([[True, True, True], [False, False, False]])
    pooled = OPS.pool_tokens(values(2, 3, K), mask)
    assert torch.isfinite(pooled).all() and (pooled[1] == 0).all()


@pytest.mark.parametrize("kept", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unselected_weights_are_never_read(dtype: torch.dtype, kept: int) -> None:
    """NaN in every unselected row or column must reach neither the output nor a gradient."""
    rows, columns = chosen(N, kept), chosen(K, kept)
    by_row, by_column = values(N, K, dtype=dtype), values(N, K, dtype=dtype)
    by_row[unchosen(N, rows)] = NAN
    by_column[:, unchosen(K, columns)] = NAN
    cases = [
        (OPS.sliced_linear, values(T, K, dtype=dtype, grad=True), by_row, rows),
        (OPS.sliced_linear_in, values(T, kept, dtype=dtype, grad=True), by_column, columns),
    ]
    for op, x, weight, idx in cases:
        weight.requires_grad_()
        out = op(x, weight, idx)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()
    wide = values(T, N, dtype=dtype)
    wide[:, unchosen(N, rows)] = NAN
    assert torch.isfinite(OPS.gather_channels(wide, rows)).all()


@pytest.mark.parametrize("kept", [1, 4])
def test_channels_that_were_dropped_come_back_as_exact_zeros(kept: int) -> None:
    rows = chosen(N, kept)
    full = OPS.scatter_channels(values(T, kept), rows, N)
    assert (full[:, unchosen(N, rows)] == 0).all()
    weight = values(N, K, grad=True)
    OPS.sliced_linear(values(T, K), weight, rows).sum().backward()
    assert (weight.grad[unchosen(N, rows)] == 0).all()


def test_infinity_beside_a_dropped_channel_stays_where_it_is() -> None:
    """A scatter that multiplies by zero would turn infinity into NaN."""
    y = torch.full((T, 1), float("inf"))
    full = OPS.scatter_channels(y, torch.tensor([2]), 4)
    assert torch.isinf(full[:, 2]).all() and (full[:, [0, 1, 3]] == 0).all()


@pytest.mark.parametrize("name", ["sliced_linear", "sliced_linear_in"])
def test_autocast_computes_as_a_linear_does(name: str) -> None:
    x, weight, idx = samples(torch.float32, 4, True)[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(OPS, name)(x, weight, idx)
        expected = plain(name, (x, weight, idx))
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.bfloat16])
    got.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    grads = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    expected.float().sum().backward()
    for ours, theirs in zip(grads, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", ["sliced_linear", "sliced_linear_in"])
def test_autocast_leaves_fp64_alone(name: str) -> None:
    arguments = samples(torch.float64, 4, False)[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(OPS, name)(*arguments)
    assert got.dtype == torch.float64


def test_a_frozen_weight_does_not_keep_the_input_alive() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, weight, idx = samples(torch.float64, 4, True)["sliced_linear"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        OPS.sliced_linear(x * 1.0, weight.detach(), idx)
    assert not any(tensor.shape == x.shape for tensor in saved)


def test_top_channels_are_ascending_and_the_largest() -> None:
    scores = torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0])
    assert OPS.topk_channels(scores, 2).tolist() == [1, 3]
    assert OPS.topk_channels(scores, 5).tolist() == [0, 1, 2, 3, 4]


def test_the_marker_is_an_identity() -> None:
    x, none = values(T, K, grad=True), torch.empty(0, 0)
    out = OPS.site(x, values(N, K), none, none, [], "0.5,0.5")
    assert torch.equal(out, x)
    out.sum().backward()
    assert (x.grad == 1).all()


def test_a_list_is_padded_with_rows_that_the_model_computes_anyway() -> None:
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    taken = OPS.gather_tokens(x, TAKEN, inverse(TAKEN))
    assert torch.equal(taken, x.flatten(0, 1)[[4, 1, 4]])
    taken.abs().sqrt().sum().backward()
    expected = torch.zeros(6, K, dtype=torch.float64)
    expected[[4, 1]] = (x.sign() / x.abs().sqrt() / 2).flatten(0, 1)[[4, 1]].detach()
    assert x.grad is not None and torch.allclose(x.grad.flatten(0, 1), expected)
    nothing = torch.full((2,), -1)
    assert torch.equal(OPS.gather_tokens(x, nothing, inverse(nothing)), x.flatten(0, 1)[[0, 0]])
