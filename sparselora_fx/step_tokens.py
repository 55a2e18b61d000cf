"""What a call knows of its tokens: their counts, and the lists that its graphs are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparselora_fx.counting import CountedBatch
from sparselora_fx.state import State
from sparselora_fx.token_lists import (
    TokenCounts,
    TokenLists,
    count,
    list_lengths,
    token_lists,
)
from sparselora_fx.tokens import Tokens


def step_counts(
    state: State,
    tokens: Tokens,
    labelled: Tensor | None,
    arguments: Mapping[str, Any],
    counted: CountedBatch | None,
    shift: bool | None,
) -> TokenCounts:
    """The batch's counts: those that came with it, if it is that batch, else read from the
    device."""
    if counted is None or not counted.fits(state.plan, arguments, shift):
        return count(tokens, labelled)
    counted.check(tokens, labelled)
    return counted.counts


def step_lists(
    state: State, tokens: Tokens | None, labelled: Tensor | None, counts: TokenCounts | None
) -> TokenLists:
    """The token lists of a sparse call; none for ``tokens=None``."""
    state.phase.padded = False
    if tokens is None:
        return TokenLists([], [])
    if counts is None:
        return TokenLists([tokens.sparse], [])
    grid = tokens.sparse.shape
    if tokens.split:
        # Once and for all: a graph for batches without padding would be one more to compile.
        state.padded |= counts.sparse + counts.dense < grid.numel()
        tokens = replace(tokens, padded=state.padded)
    # Blocks that are compiled one by one do not see who reads their rows.
    whole = not state.blocks and state.measured is None
    state.phase.padded = whole and tokens.padded
    asked = {"split": tokens.split, "padded": tokens.padded, "labelled": labelled is not None}
    lengths = tuple(list_lengths(counts, grid, **asked))
    if state.cuda_graphs is not None:
        lengths = state.cuda_graphs.lengths(grid, lengths, tokens.sparse.device)
    return token_lists(tokens, labelled, lengths, counts.unlike)


def is_worth_it(state: State, tokens: Tokens | None, counts: TokenCounts | None) -> bool:
    """Whether a call that the schedule makes sparse has sparse tokens enough."""
    plan = state.plan
    counted = state.forced is None and state.measured is None
    if tokens is None or counts is None or not tokens.split:
        if counted:
            state.tally.all_sparse += 1
        if plan.tokens == "context" and not state.every_token:
            state.tally.warn_unknown()
        return True
    real = counts.sparse + counts.dense
    least = 0.0 if state.measured else plan.min_sparse
    few = counts.sparse == 0 or counts.sparse < least * real
    if counted:
        state.tally.add(counts.sparse, real, dense=few)
    if few and not state.measured:
        state.tally.warn_few(counts.sparse, real, least)
    return not few
