"""The functions that score channels, and how a plan names them.

A score is a word for what is looked at, and words for what is made of it, joined by ``+``:
``"tokens+prior+weighted"``. h_tn is channel n of a region's hidden state at token t, h~ its
approximation from the factors, w_n the norm of the consumer's column n. A region keeps the channels
of largest score. Each function below is an op of rewritten graphs; its body is its meaning.

Shape letters: T tokens (any leading dims), K input channels, N channels, R rank, n tokens sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PlanError
from .ops import LIBRARY, Body, same_tokens

WORDS = {
    "pooled": "f of the factors on each sample's mean token (the paper's, for feed-forward)",
    "tokens": "mean over context tokens of h~_tn^2",
    "strided": "the same over 64 evenly spaced context tokens; strided:N over N of them",
    "prior": "mean of h_tn^2 over the calibration tokens; with one of the above, the mean of both",
    "weighted": "times w_n^2: what dropping channel n costs in the consumer's output",
    "normalised": "each token divided by its own sum over n of (h_tn w_n)^2",
    "rope_half": "query and key channels d and d + D/2 kept or dropped together",
    "rope_interleaved": "query and key channels 2d and 2d + 1 kept or dropped together",
}
_CONTEXT = ("pooled", "tokens", "strided")
_ROPE = ("rope_half", "rope_interleaved")
_SAMPLES = 64
ACROSS = "norms_across"  # norms of a weight the other way round, see `SVDEstimator.vectors`
DEFAULT = "strided+weighted"  # for factors alone; docs/estimator.md says why
DEFAULT_CALIBRATED = "strided+prior+weighted"  # the same page
_TAGS = (torch.Tag.pt2_compliant_tag,)


@dataclass(frozen=True)
class Score:
    """What a plan's score says; see `WORDS`.

    Attributes:
        context: "pooled", "tokens", "strided", or "" (the prior alone).
        samples: tokens that "strided" looks at.
        rope: "", "half" or "interleaved".
    """

    context: str = "pooled"
    samples: int = _SAMPLES
    prior: bool = False
    weighted: bool = False
    normalised: bool = False
    rope: str = ""


def parse_score(text: str) -> Score:
    """Read words joined by ``+``, in any order; `PlanError` names what is allowed."""
    given = [word.strip() for word in text.split("+")] if isinstance(text, str) else [""]
    words = [word.partition(":")[0] for word in given]
    for word in words:
        if word not in WORDS:
            raise PlanError(
                f"score is {text!r}; allowed: one of {', '.join(_CONTEXT)} and prior, or several "
                f"joined by '+', with any of {', '.join(list(WORDS)[4:])}: for example "
                "'tokens+prior+weighted'"
            )
    context = [word for word in words if word in _CONTEXT]
    rope = [word for word in words if word in _ROPE]
    if len(set(words)) != len(words) or len(context) > 1 or len(rope) > 1:
        raise PlanError(f"score {text!r} says a thing twice; name one of {', '.join(_CONTEXT)}")
    if not context and "prior" not in words:
        raise PlanError(f"score {text!r} looks at nothing; add one of {', '.join(_CONTEXT)}, prior")
    samples = _SAMPLES
    for word, full in zip(words, given, strict=True):
        if ":" in full:
            number = full.partition(":")[2]
            if word != "strided" or not number.isdecimal() or int(number) < 1:
                raise PlanError(f"score has {full!r}; only 'strided' takes a count: 'strided:64'")
            samples = int(number)
    return Score(
        context[0] if context else "",
        samples,
        "prior" in words,
        "weighted" in words,
        "normalised" in words,
        rope[0].partition("_")[2] if rope else "",
    )


def check_score(text: str | None) -> str | None:
    """A plan's score as it is if it can be read; None: the default for the estimator."""
    if text is not None:
        parse_score(text)
    return text


def check_flag(what: str, value: object) -> bool:
    """A plan's yes or no; `PlanError` for anything else."""
    if isinstance(value, bool):
        return value
    raise PlanError(f"{what} is {value!r}; allowed: true, false")


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
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
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
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
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
