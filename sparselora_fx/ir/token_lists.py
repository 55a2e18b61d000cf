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

    def sums(self) -> list[int]:
        """In the order of `sums_of`."""
        return [self.sparse, self.dense, self.labelled, self.unlike]


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


def sums_of(tokens: Tokens, labelled: Tensor | None) -> Tensor:
    """What `TokenCounts` holds, as ``int64[4]`` on the batch's device (``[2]`` without labels)."""
    masks = [tokens.sparse, tokens.dense]
    if labelled is not None:
        masks += [labelled, labelled ^ tokens.dense]
    return torch.stack(masks).flatten(1).sum(dim=1)


def count(tokens: Tokens, labelled: Tensor | None) -> TokenCounts:
    """Count a batch's tokens. On a GPU this waits for the device; it is a step's only such read."""
    return TokenCounts(*sums_of(tokens, labelled).tolist())


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
    tokens: Tokens, labelled: Tensor | None, lengths: Sequence[int], unlike: int
) -> TokenLists:
    """Make a step's lists, on the batch's device and without a question to it.

    Args:
        tokens: with ``padded`` as it is to be treated.
        labelled: the tokens whose prediction carries loss, if they are to be listed.
        lengths: places for tokens in each list, as `list_lengths` counts them or more; further
            places hold -1.
        unlike: as in `TokenCounts`.
    """
    masks = [tokens.sparse, tokens.dense] if tokens.split else []
    if tokens.split and tokens.padded:
        masks += [tokens.sparse | tokens.dense, ~tokens.sparse]
    apart = labelled is not None and not (tokens.split and unlike == 0)
    if labelled is not None and apart:
        masks.append(labelled)
    taken: set[int] = set()
    lists = [_token_list(m, n, taken) for m, n in zip(masks, lengths, strict=True)]
    last = None if labelled is None else lists.pop() if apart else lists[1]
    # A list that no call had before would else be taken to be as large for ever, and with it, by
    # comparison, the batch.
    mark_dynamic(tokens.sparse)
    counted = None if tokens.unmasked and not tokens.split else tokens.sparse
    return TokenLists(MarkedTokens(counted, *lists), last)


def _token_list(mask: Tensor, length: int, taken: set[int]) -> TokenList[Tensor]:
    """The flat indices of a ``bool[B, L]`` mask, padded with -1, and their inverse ``int64[B, L]``.

    Lists are as long as no other size of the batch (and none of ``taken``, which is added to), lest
    the compiler take two sizes for one because they agree this once.
    """
    rows, columns = mask.shape
    size = max(_ROUND, -(-length // _ROUND) * _ROUND)
    while size in taken | {0, 1, rows, columns, rows * columns}:
        size += _ROUND // 2  # rows of a list are computed, read or not: no more than needed
    taken.add(size)
    flat = mask.flatten()
    # Views of nothing: the compiler would ask for the sizes of what is behind them, too.
    idx = torch.nonzero_static(flat, size=size, fill_value=-1).squeeze_(1)
    inverse = flat.cumsum(0).mul_(flat).sub_(1).resize_(rows, columns)
    mark_dynamic(idx)
    mark_dynamic(inverse)
    return TokenList(idx, inverse)


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
    before = torch.nn.functional.pad(carries[:, 1:], (0, 1), value=False)
    return before if shift else before | carries
