"""The functions that score channels, and how a plan names them.

A score is a term for what is looked at, and terms for what is made of it, joined by ``+``:
``"tokens+prior+weighted"``. h_tn is channel n of a region's hidden state at token t, h~ its
approximation from the factors, w_n the norm of the consumer's column n. A region keeps the channels
of largest score. Each function below is an op of rewritten graphs; its body is its meaning.

Shape letters: T tokens (any leading dims), K input channels, N channels, R rank, n tokens sampled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparselora_fx.ir.ops import LIBRARY, Body, dtype_of_sums, same_tokens

ACROSS = "norms_across"  # norms of a weight the other way round, see `SVDEstimator.vectors`
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _op(schema: str) -> Callable[[Body], Body]:
    """Define an op whose eager body is the decorated function. Its rule for tracing is in
    `fakes`: the body would read sizes, and fix them."""
    LIBRARY.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]

    def register(body: Body) -> Body:
        torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd")(body)
        return body

    return register


@_op("sample_tokens(Tensor x, Tensor? counted, int n) -> Tensor")
def sample_tokens(x: Tensor, counted: Tensor | None, n: int) -> Tensor:
    """``y[n, K]``: n counted tokens of ``x[T, K]``, evenly spaced, the first one included.

    With fewer than n, tokens repeat; without any, rows are zero. ``counted`` is bool over the
    tokens; None, or of another grid: all count. Source: uniform sampling as in the norm estimates
    of randomised matrix products.
    """
    rows = x.flatten(0, -2)
    tokens = rows.shape[0]
    steps = torch.arange(n, device=x.device)
    if not isinstance(tokens, int) or tokens == 0:  # a compiler fuses the padding into the reading
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    if counted is None or not same_tokens(x, counted) or counted.numel() == 0:
        return rows.index_select(0, steps * tokens // n)
    order = counted.flatten().cumsum(0)
    wanted = steps * order[-1] // n + 1  # the wanted-th counted token, from 1
    return rows.index_select(0, torch.searchsorted(order, wanted).clamp(max=tokens - 1))


@_op("low_rank_linear(Tensor z, Tensor a) -> Tensor")
def low_rank_linear(z: Tensor, a: Tensor) -> Tensor:
    """``y[T, N] = z[T, R] @ a[N, R].T`` in z's dtype: the wide half of an approximated linear."""
    return z @ a.to(z.dtype).t()


@_op("channel_energy(Tensor h, Tensor? counted, Tensor? norms, bool normalise) -> Tensor")
def channel_energy(
    h: Tensor, counted: Tensor | None, norms: Tensor | None, normalise: bool
) -> Tensor:
    """``e_n = mean_t h_tn^2`` of ``h[T, N]`` over counted tokens -> ``[N]``, float32 or float64.

    With ``normalise``: ``mean_t h_tn^2 / sum_m (h_tm norms_m)^2``, so that a token counts by the
    share that a channel has in it, not by its size: outlier tokens (the first one, separators) do
    not decide for all. The first is the paper's column norm (arXiv 2506.16500, section 3), squared;
    the second minimises the mean *relative* error per token if channels' contributions are
    orthogonal.
    """
    wide = dtype_of_sums(h)
    square = h.flatten(0, -2).to(wide).square()
    weight = _token_weights(h, counted, square)
    if normalise:
        weighted = square if norms is None else square * norms.to(wide).square()
        weight = weight / weighted.sum(dim=1).clamp(min=torch.finfo(wide).tiny)
    return (square * weight[:, None]).sum(dim=0)


@_op(
    "low_rank_energy(Tensor z, Tensor a, Tensor? offset, Tensor? counted, Tensor? norms,"
    " bool normalise) -> Tensor"
)
def low_rank_energy(
    z: Tensor,
    a: Tensor,
    offset: Tensor | None,
    counted: Tensor | None,
    norms: Tensor | None,
    normalise: bool,
) -> Tensor:
    """`channel_energy` of ``z a^T + offset`` without forming it: ``z[T, R]``, ``a[N, R]``.

    With z'_t = (z_t, 1) and a' = (a, offset): ``e_n = a'_n (mean_t z'_t z'_t^T) a'_n^T``, and a
    token's own energy is ``z'_t (a'^T diag(norms^2) a') z'_t^T``. T * R * R steps, not T * R * N.
    """
    wide = dtype_of_sums(z)
    rows, columns = a.to(wide), z.flatten(0, -2).to(wide)
    if offset is not None:
        columns = torch.nn.functional.pad(columns, (0, 1), value=1.0)
        rows = torch.cat([rows, offset.to(wide)[:, None]], dim=1)
    weight = _token_weights(z, counted, columns)
    if normalise:
        scaled = rows if norms is None else rows * norms.to(wide)[:, None]
        own = ((columns @ (scaled.t() @ scaled)) * columns).sum(dim=1)
        weight = weight / own.clamp(min=torch.finfo(wide).tiny)
    gram = (columns * weight[:, None]).t() @ columns
    return ((rows @ gram) * rows).sum(dim=1).clamp(min=0)


def _token_weights(x: Tensor, counted: Tensor | None, like: Tensor) -> Tensor:
    """One over the number of counted tokens, zero elsewhere: ``[T]``."""
    if counted is None or not same_tokens(x, counted):
        return like.new_full((like.shape[0],), 1.0) / like.shape[0]
    flags = counted.flatten().to(like.dtype)
    return flags / flags.sum().clamp(min=1)
