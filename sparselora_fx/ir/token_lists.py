"""Token masks as lists: counted in one read, or where the batch was made, and built by operations
of fixed size.

A list's length must be known before it can be made. Asked of a tensor on a GPU, it makes the host
wait for all that the GPU has still to do. So all that a step asks is asked in one read, or, where
the data loader has counted the tokens already, in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselora_fx._torch import mark_dynamic
from sparselora_fx.ir.markers import MarkedTokens, TokenList

_ROUND = 16  # token lists grow in steps of this, so that their matmuls stay aligned


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens of a batch ``[B, L]`` are ``sparse``, ``dense`` and ``labelled`` (their
    prediction carries loss), and how many are ``unlike``: labelled or dense, and not both."""

    sparse: int
    dense: int
    labelled: int = 0
    unlike: int = 0


@dataclass(frozen=True)
class TokenLists:
    """What a site marker and the marker before the logits carry.

    Attributes:
        tokens: what every site marker of the call carries.
        labelled: the list of tokens whose prediction carries loss; the dense one of ``tokens`` if
            the dense tokens are just those, so that the compiler sees one list; None if it was not
            asked for.
    """

    tokens: MarkedTokens[Tensor]
    labelled: TokenList[Tensor] | None = None


# The tokens that a step may list or count, in the order of `PlacedTokens`. Not sparse: padding too.
SPARSE, DENSE, REAL, OTHERS, LABELLED, UNLIKE = range(6)


@dataclass(frozen=True)
class PlacedTokens:
    """Every list that a step may ask for, each as long as any can be.

    Attributes:
        idx: ``int64[6, W]``, the flat indices of the tokens of each list, then -1; ``W`` is what
            ``B * L`` tokens need. Four rows without labels.
        pos: ``int64[6, B, L]``, their inverse, -1 where a token is not in the list.
    """

    idx: Tensor
    pos: Tensor


def place(tokens: Tokens) -> tuple[PlacedTokens, Tensor]:
    """List a batch's tokens, on its device and without a question to it: few operations, for all
    lists at once. Returns the lists, and ``int64[6]``: how many tokens each has."""
    masks = [tokens.sparse, tokens.dense, tokens.sparse | tokens.dense, ~tokens.sparse]
    if tokens.labelled is not None:
        masks += [tokens.labelled, tokens.labelled ^ tokens.dense]
    stacked = torch.stack(masks)
    flat = stacked.flatten(1)
    lists, total = flat.shape
    ranks = flat.cumsum(1) * flat  # from 1; tokens of no list share the place before all
    width = -(-total // _ROUND) * _ROUND
    idx = ranks.new_full((lists, 1 + width), -1)
    idx.scatter_(1, ranks, torch.arange(total, device=ranks.device).expand_as(ranks))
    return PlacedTokens(idx[:, 1:], (ranks - 1).view_as(stacked)), flat.sum(1)


def count(totals: Tensor) -> TokenCounts:
    """A batch's counts, of what `place` says. On a GPU this waits for the device; it is a step's
    only such read."""
    sparse, dense, _, _, *labelled = totals.tolist()
    return TokenCounts(sparse, dense, *labelled)


def list_lengths(
    counts: TokenCounts, grid: Sequence[int], *, split: bool, padded: bool, labelled: bool
) -> list[int]:
    """How many tokens each list of a step holds, in the order of `TokenLists`."""
    lengths = [counts.sparse, counts.dense] if split else []
    if split and padded:
        lengths += [counts.sparse + counts.dense, grid[0] * grid[1] - counts.sparse]
    if labelled and not (split and counts.unlike == 0):
        lengths.append(counts.labelled)
    return lengths


def token_lists(
    tokens: Tokens,
    placed: PlacedTokens,
    lengths: Sequence[int],
    *,
    labelled: bool,
    unlike: int,
) -> TokenLists:
    """Make a step's lists.

    Args:
        tokens: with ``padded`` as it is to be treated.
        placed: the same batch's, with what ``tokens`` takes to be dense.
        lengths: places for tokens in each list, as `list_lengths` counts them or more; further
            places hold -1.
        labelled: whether the tokens whose prediction carries loss are to be listed.
        unlike: as in `TokenCounts`.
    """
    rows = [SPARSE, DENSE] if tokens.split else []
    if tokens.split and tokens.padded:
        rows += [REAL, OTHERS]
    apart = labelled and not (tokens.split and unlike == 0)
    if apart:
        rows.append(LABELLED)
    sizes = _sizes(placed, lengths)
    every = placed.idx.unbind()
    # Views of nothing: the compiler would ask for the sizes of what is behind them, too.
    lists = [
        TokenList(_long(every[row], size), torch.select_copy(placed.pos, 0, row))
        for row, size in zip(rows, sizes, strict=True)
    ]
    for tensor in (tensor for part in lists for tensor in part):
        mark_dynamic(tensor)
    last = None if not labelled else lists.pop() if apart else lists[1]
    return TokenLists(MarkedTokens(whole(tokens).tokens.counted, *lists), last)


def whole(tokens: Tokens) -> TokenLists:
    """No lists: all tokens of the batch are sparse, and only what counts in scores is said."""
    # A mask that no call had before would else be taken to be as large for ever, and with it, by
    # comparison, the batch.
    mark_dynamic(tokens.sparse)
    counted = None if tokens.unmasked and not tokens.split else tokens.sparse
    return TokenLists(MarkedTokens(counted))


def _sizes(placed: PlacedTokens, lengths: Sequence[int]) -> list[int]:
    """How long lists become that hold so many tokens: as no other size of the batch, and each as no
    other list, lest the compiler take two sizes for one because they agree this once."""
    _, rows, columns = placed.pos.shape
    taken, sizes = {0, 1, rows, columns, rows * columns}, []
    for length in lengths:
        size = max(_ROUND, -(-length // _ROUND) * _ROUND)
        while size in taken:
            size += _ROUND // 2  # rows of a list are computed, read or not: no more than needed
        taken.add(size)
        sizes.append(size)
    return sizes


def _long(idx: Tensor, size: int) -> Tensor:
    """A list's first places, or all and further ones that hold -1, as a copy."""
    missing = size - idx.shape[0]
    if missing > 0:
        return torch.nn.functional.pad(idx, (0, missing), value=-1)
    return idx.narrow_copy(0, 0, size)


IGNORED = -100  # the label that carries no loss, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Tokens:
    """``sparse`` and ``dense``: disjoint ``bool[B, L]``; tokens of neither are padding. With
    ``split`` they are treated apart; ``unmasked``: nothing tells padding from tokens, so that all
    of them are tokens; ``labelled``: those whose prediction carries loss, None without labels;
    ``padded``: there is, or was, padding to tell from them."""

    sparse: Tensor
    dense: Tensor
    split: bool
    unmasked: bool = False
    labelled: Tensor | None = None
    padded: bool = False


def carry_loss(labels: Tensor, *, shift: bool | None) -> Tensor:
    """The tokens ``bool[B, L]`` whose prediction carries loss, by their ``labels[B, L]``; for a
    ``shift`` of None those of either convention."""
    carries = labels != IGNORED
    if shift is False:
        return carries
    before = torch.constant_pad_nd(carries[:, 1:], (0, 1), False)
    return before if shift else before | carries
