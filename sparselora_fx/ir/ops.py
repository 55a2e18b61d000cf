"""The intermediate representation: every op that a rewritten graph may contain.

Each op has an eager body, and that body *is* the meaning of the op; lowering may only make
it faster. Shapes without values are in `fakes`, derivatives in `autograd`.

Shape letters: T tokens (any leading dims), K input channels, N output channels, S kept channels, R
rank, B samples.

Index arguments (``idx``) are 1-D int64, unique and in range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparselora_fx.ir import checks

LIBRARY = torch.library.Library("sparselora", "DEF")
OPS = torch.ops.sparselora
# Identities that carry what is known into a traced graph.
MARKERS = ("site", "label_rows", "observed")
_TAGS = (torch.Tag.pt2_compliant_tag,)
Body = Callable[..., Tensor]


def _define(schema: str) -> None:
    LIBRARY.define(schema, tags=_TAGS)


def _eager(name: str, check: Callable[..., None] | None = None) -> Callable[[Body], Body]:
    """Registers an op's body behind its check. The body alone stays in this module, for lowerings
    that see through the op: what is traced has no values to check."""

    def register(body: Body) -> Body:
        def checked(*args: object) -> Tensor:
            if check is not None:
                check(*args)
            return body(*args)

        torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd")(checked)
        return body

    return register


_define("sliced_linear(Tensor x, Tensor w, Tensor idx) -> Tensor")
_define("sliced_linear_dgrad(Tensor gy, Tensor w, Tensor idx) -> Tensor")
_define("sliced_linear_wgrad(Tensor gy, Tensor x, Tensor idx, SymInt n) -> Tensor")
_define("sliced_linear_in(Tensor h, Tensor w, Tensor idx) -> Tensor")
_define("sliced_linear_in_dgrad(Tensor gy, Tensor w, Tensor idx) -> Tensor")
_define("sliced_linear_in_wgrad(Tensor gy, Tensor h, Tensor idx, SymInt n) -> Tensor")
_define("gather_channels(Tensor x, Tensor idx) -> Tensor")
_define("scatter_channels(Tensor y, Tensor idx, SymInt n) -> Tensor")
_define("channel_rows(Tensor channels, int inner, int outer_stride, int[] offsets) -> Tensor")
_define("topk_channels(Tensor scores, int k) -> Tensor")
_define("pool_tokens(Tensor x, Tensor? token_weight) -> Tensor")
_define("gather_tokens(Tensor x, Tensor idx, Tensor pos) -> Tensor")
_define("gather_or_zero_tokens(Tensor x, Tensor idx, Tensor pos) -> Tensor")
_define("scatter_tokens(Tensor y, Tensor idx, Tensor pos) -> Tensor")
_define(
    "scatter_two_lists(Tensor y, Tensor z, Tensor y_idx, Tensor y_pos, Tensor z_idx, Tensor z_pos)"
    " -> Tensor"
)
_define("low_rank_norms(Tensor x, Tensor a, Tensor b, Tensor? token_weight) -> Tensor")
# The marker: an identity on x that carries per-layer data into the graph. Removed before anything
# runs.
_define(
    "site(Tensor(a) x, Tensor weight, Tensor a, Tensor b, Tensor[] tokens, str spec,"
    " Tensor[]? statistics=None) -> Tensor(a)"
)
# The marker of online calibration: an identity on x that says which rows to observe. Removed too.
_define("observed(Tensor(a) x, Tensor weight, Tensor[] picked) -> Tensor(a)")
# The marker before the logits: an identity on x that says which rows carry a label. Removed too.
_define("label_rows(Tensor(a) x, Tensor labels, Tensor idx, Tensor pos, bool shift) -> Tensor(a)")


@_eager("sliced_linear", checks.out_sliced)
def sliced_linear(x: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    """``y[T, S] = x[T, K] @ w[idx, :].T`` for ``w[N, K]``; computed in x's dtype (w is cast after
    the gather)."""
    return x @ w.index_select(0, idx).to(x.dtype).t()


@_eager("sliced_linear_dgrad", checks.out_sliced_dgrad)
def sliced_linear_dgrad(gy: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    """``gx[T, K] = gy[T, S] @ w[idx, :]``."""
    return gy @ w.index_select(0, idx).to(gy.dtype)


@_eager("sliced_linear_wgrad", checks.wgrad)
def sliced_linear_wgrad(gy: Tensor, x: Tensor, idx: Tensor, n: int) -> Tensor:
    """``gw[N, K]``: rows idx hold ``gy.T @ x``, the others zero. Needed when w trains (a LoRA B
    matrix)."""
    rows = gy.flatten(0, -2).t() @ x.flatten(0, -2)
    return rows.new_zeros(n, x.shape[-1]).index_copy_(0, idx, rows)


@_eager("sliced_linear_in", checks.in_sliced)
def sliced_linear_in(h: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    """``y[T, N] = h[T, S] @ w[:, idx].T`` for ``w[N, K]``; computed in h's dtype."""
    return h @ w.t().index_select(0, idx).to(h.dtype)


@_eager("sliced_linear_in_dgrad", checks.in_sliced_dgrad)
def sliced_linear_in_dgrad(gy: Tensor, w: Tensor, idx: Tensor) -> Tensor:
    """``gh[T, S] = gy[T, N] @ w[:, idx]``."""
    return gy @ w.t().index_select(0, idx).to(gy.dtype).t()


@_eager("sliced_linear_in_wgrad", checks.wgrad)
def sliced_linear_in_wgrad(gy: Tensor, h: Tensor, idx: Tensor, n: int) -> Tensor:
    """``gw[N, K=n]``: columns idx hold ``gy.T @ h``, the others zero."""
    columns = gy.flatten(0, -2).t() @ h.flatten(0, -2)
    return columns.new_zeros(gy.shape[-1], n).index_copy_(1, idx, columns)


@_eager("gather_channels", checks.gather)
def gather_channels(x: Tensor, idx: Tensor) -> Tensor:
    """``y[T, S] = x[T, N][..., idx]``."""
    return x.index_select(-1, idx)


@_eager("scatter_channels", checks.scatter)
def scatter_channels(y: Tensor, idx: Tensor, n: int) -> Tensor:
    """``x[T, N]`` with ``x[..., idx] = y[T, S]`` and zeros elsewhere.

    Written as a gather through the inverse index, which is pointwise: a compiler fuses it into its
    neighbours, where a scatter would be a kernel of its own.
    """
    where = torch.full((n,), -1, dtype=torch.int64, device=idx.device)
    where = where.scatter(0, idx, torch.arange(idx.shape[0], device=idx.device))
    return torch.where(where >= 0, y.index_select(-1, where.clamp(min=0)), 0)


@_eager("channel_rows")
def channel_rows(channels: Tensor, inner: int, outer_stride: int, offsets: list[int]) -> Tensor:
    """Rows of a weight that hold the given channels: ``(c // inner) * outer_stride + c % inner +
    o`` for each o.

    One formula covers plain, fused, interleaved and grouped-head layouts. Returns ``[len(offsets)
    * S]``, offset-major. Offsets are written as arithmetic: a tensor made of them would be a
    constant of the graph, which compilers' caches cannot keep on a GPU.
    """
    rows = channels // inner * outer_stride + channels % inner
    first, count = offsets[0], len(offsets)
    if count == 1:
        return rows + first
    step = offsets[1] - first
    if offsets == [first + i * step for i in range(count)]:
        starts = torch.arange(count, device=channels.device)[:, None] * step + first
        return (starts + rows).reshape(-1)
    return torch.cat([rows + offset for offset in offsets])


@_eager("topk_channels", checks.top)
def topk_channels(scores: Tensor, k: int) -> Tensor:
    """The k channels of largest score, ascending: ``[N] -> int64[k]``."""
    return torch.sort(torch.topk(scores, k, sorted=False).indices).values


@_eager("pool_tokens")
def pool_tokens(x: Tensor, token_weight: Tensor | None) -> Tensor:
    """Mean over each sample's counted tokens: ``x[B, L, K]`` or ``[B*L, K]`` with
    ``token_weight[B, L]`` -> ``[B, K]``.

    Without weights (or with weights of another token grid) every token counts, and a flat x is one
    sample.
    """
    if token_weight is None or not same_tokens(x, token_weight):
        return x.mean(dim=1).flatten(0, -2) if x.dim() > 2 else x.mean(dim=0, keepdim=True)
    samples, length = token_weight.shape
    tokens = x.reshape(samples, length, x.shape[-1])
    weight = token_weight.to(x.dtype)
    total = weight.sum(dim=1, keepdim=True).clamp(min=1)
    return (tokens * weight[..., None]).sum(dim=1) / total


@_eager("gather_tokens")
def gather_tokens(x: Tensor, idx: Tensor, pos: Tensor) -> Tensor:
    """``y[P, K] = x[B, L, K]`` at flat token indices ``idx[P]``; an index of -1 repeats the list's
    first token.

    A repeated row is one that the model computes anyway, so no function has a value or a derivative
    there that it would not have otherwise; nothing reads it (its transpose is `scatter_tokens`).
    ``pos[B, L]`` is the inverse of idx (-1: not taken); x may also be flat, ``[B*L, K]``.
    """
    safe = torch.where(idx >= 0, idx, idx[:1].clamp(min=0))
    return x.flatten(0, -2).index_select(0, safe)


@_eager("gather_or_zero_tokens")
def gather_or_zero_tokens(x: Tensor, idx: Tensor, pos: Tensor) -> Tensor:
    """As `gather_tokens`, but an index of -1 gives a row of zeros: the transpose of
    `scatter_tokens`, and what sums over tokens."""
    rows = x.flatten(0, -2).index_select(0, idx.clamp(min=0))
    return torch.where((idx >= 0)[:, None], rows, 0)


@_eager("scatter_tokens")
def scatter_tokens(y: Tensor, idx: Tensor, pos: Tensor) -> Tensor:
    """``x[B, L, K]`` with ``y[P, K]`` at the tokens idx and zeros elsewhere."""
    return torch.where((pos >= 0)[..., None], _spread(y, pos), 0)


def _spread(y: Tensor, pos: Tensor) -> Tensor:
    """``x[B, L, K] = y[pos]``, and y's first row where pos is -1."""
    return y.index_select(0, pos.flatten().clamp(min=0)).view(*pos.shape, y.shape[1])


@_eager("scatter_two_lists")
def scatter_two_lists(
    y: Tensor, z: Tensor, y_idx: Tensor, y_pos: Tensor, z_idx: Tensor, z_pos: Tensor
) -> Tensor:
    """``x[B, L, K]`` from two disjoint token lists of one token at least.

    Tokens of neither (padding) repeat y's first row, without a gradient: nobody reads them, but a
    row of zeros might have a norm without a derivative.
    """
    rest = torch.where((z_pos >= 0)[..., None], _spread(z, z_pos), y[:1])
    return torch.where((y_pos >= 0)[..., None], _spread(y, y_pos), rest)


@_eager("low_rank_norms")
def low_rank_norms(x: Tensor, a: Tensor, b: Tensor, token_weight: Tensor | None) -> Tensor:
    """Column norms of ``x @ b.T @ a.T`` over counted tokens, ``a[N, R]``, ``b[R, K]`` -> ``[N]``
    in fp32 or fp64.

    ``||column_n||^2 = a_n G a_n^T`` with the Gram matrix G of ``x @ b.T``: T x N values are never
    formed.
    """
    wide = dtype_of_sums(x)
    projected = (x.flatten(0, -2) @ b.to(x.dtype).t()).to(wide)
    if token_weight is not None and same_tokens(x, token_weight):
        projected = projected * token_weight.reshape(-1, 1).to(wide)
    rows = a.to(wide)
    gram = projected.t() @ projected
    return ((rows @ gram) * rows).sum(dim=1).clamp(min=0).sqrt()


@torch.library.impl(LIBRARY, "site", "CompositeImplicitAutograd")
def site(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    tokens: list[Tensor],
    spec: str,
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    """Identity on x. Carries a frozen weight's factors, the batch's token lists, the plan's spec
    and the vectors that its score needs into the graph.

    ``tokens`` is empty, or the counted tokens ``bool[B, L]``, or those and two lists with their
    inverses (`sparselora_fx.runtime.token_policy.Tokens`).
    """
    for grid in tokens[::2]:  # the counted tokens, and each list's inverse
        agree(x, grid)
    return x.view_as(x)


@torch.library.impl(LIBRARY, "observed", "CompositeImplicitAutograd")
def observed(x: Tensor, weight: Tensor, picked: list[Tensor]) -> Tensor:
    """Identity on x, which a frozen weight reads. ``picked`` is `online.Picked.tensors`."""
    if len(picked) > 1:
        agree(x, picked[1])
    return x.view_as(x)


@torch.library.impl(LIBRARY, "label_rows", "CompositeImplicitAutograd")
def label_rows(x: Tensor, labels: Tensor, idx: Tensor, pos: Tensor, shift: bool) -> Tensor:
    """Identity on x, the input of the output embedding.

    ``idx[P]`` and ``pos[B, L]`` are a token list (`sparselora_fx.runtime.token_policy`) that holds
    every token whose prediction ``labels[B, L]`` carries loss: label t+1 of token t with ``shift``,
    else label t.
    """
    agree(x, pos)
    return x.view_as(x)


def agree(x: Tensor, grid: Tensor) -> bool:
    """Whether x has one row per token of the grid. Asked while tracing, it tells the compiler that
    sizes are equal."""
    if x.dim() == 3:
        return bool(x.shape[0] == grid.shape[0]) and bool(x.shape[1] == grid.shape[1])
    return same_tokens(x, grid)


def same_tokens(x: Tensor, token_weight: Tensor) -> bool:
    """Whether a grid of tokens has as many as x."""
    tokens = x.numel() // x.shape[-1]  # not Size.numel(), which fixes symbolic sizes
    return bool(tokens == token_weight.numel())


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """The dtype of sums over tokens: float32, or float64 of float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
