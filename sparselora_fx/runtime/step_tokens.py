"""What a call knows of its tokens: their counts, and the lists that its graphs are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparselora_fx.ir.markers import MarkedTokens
from sparselora_fx.ir.token_lists import (
    TokenCounts,
    TokenLists,
    Tokens,
    list_lengths,
    place,
    token_lists,
    whole,
)
from sparselora_fx.runtime.calls import CallKind
from sparselora_fx.runtime.counting import CountedBatch, ListedTokens
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS, named_tokens
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.token_policy import split_tokens, token_grid


def known_tokens(runtime: Runtime, arguments: dict[str, object]) -> dict[str, object]:
    """A call's arguments, with what is known besides of the tokens that carry loss."""
    named, kept = named_tokens(), runtime.kept_labels
    if named is not None:
        return {**arguments, OUTPUT_TOKENS: named}
    if kept is not None and arguments.get("labels") is None:
        return {**arguments, "labels": kept.labels}
    return arguments


def shift_of(runtime: Runtime, arguments: Mapping[str, object]) -> bool | None:
    """How the labels of a call are predicted: see `Convention.shift`."""
    convention, kept = runtime.convention, runtime.kept_labels
    mine = kept is not None and kept.own_loss and arguments.get("labels") is kept.labels
    return None if mine and not convention.said else convention.shift


def step_tokens(
    runtime: Runtime,
    arguments: Mapping[str, object],
    counted: CountedBatch | None,
    shift: bool | None,
) -> tuple[Tokens | None, ListedTokens | None]:
    """The call's tokens, and what came with the batch, if it is that batch."""
    grid, comparison = token_grid(arguments), runtime.comparison
    if (
        counted is not None
        and grid is not None
        and comparison.trusted
        and counted.fits(runtime.plan, arguments, shift)
        and counted.holds(arguments, grid, comparison)
    ):
        listed = counted.listed[shift].each(lambda tensor: tensor.to(grid.device))
        return listed.tokens, listed
    return split_tokens(runtime.plan, arguments, shift=shift), None


def step_lists(
    runtime: Runtime,
    tokens: Tokens | None,
    listed: ListedTokens | None,
    *,
    trim: bool,
) -> TokenLists:
    """The token lists of a sparse call; none for ``tokens=None``. ``trim``: the tokens that carry
    loss are listed, too."""
    runtime.trace_inputs.padded = False
    if tokens is None:
        return TokenLists(MarkedTokens())
    if listed is None:
        return whole(tokens)
    counts, placed, grid = listed.counts, listed.placed, tokens.sparse.shape
    if tokens.split and (runtime.blocks or runtime.call.is_measurement):
        # Blocks that are compiled one by one do not see who reads their rows: padding is dense.
        tokens, counts = _padding_as_dense(tokens, counts)
        placed, _ = place(tokens)
    elif tokens.split:
        # Once and for all: a graph for batches without padding would be one more to compile.
        runtime.padded |= counts.sparse + counts.dense < grid.numel()
        tokens = replace(tokens, padded=runtime.padded)
    runtime.trace_inputs.padded = tokens.padded
    lengths = tuple(
        list_lengths(counts, grid, split=tokens.split, padded=tokens.padded, labelled=trim)
    )
    if runtime.cuda_graphs is not None:
        lengths = runtime.cuda_graphs.lengths(grid, lengths, tokens.sparse.device)
    return token_lists(tokens, placed, lengths, labelled=trim, unlike=counts.unlike)


def _padding_as_dense(tokens: Tokens, counts: TokenCounts) -> tuple[Tokens, TokenCounts]:
    """The same tokens with padding among the dense ones, and their counts."""
    padding = tokens.sparse.numel() - counts.sparse - counts.dense
    counts = replace(counts, dense=counts.dense + padding, unlike=counts.unlike + padding)
    return replace(tokens, dense=~tokens.sparse), counts


def is_worth_it(runtime: Runtime, tokens: Tokens | None, counts: TokenCounts | None) -> bool:
    """Whether a call that the schedule makes sparse has sparse tokens enough."""
    plan = runtime.plan
    counted = runtime.call.is_step or runtime.call.kind is CallKind.TRACE
    if tokens is None or counts is None or not tokens.split:
        if counted:
            runtime.tally.all_sparse += 1
        if plan.tokens == "context" and not runtime.every_token:
            runtime.tally.warn_unknown()
        return True
    real = counts.sparse + counts.dense
    least = 0.0 if runtime.call.is_measurement else plan.min_sparse
    few = counts.sparse == 0 or counts.sparse < least * real
    if counted:
        runtime.tally.add(counts.sparse, real, dense=few)
    if few and not runtime.call.is_measurement:
        runtime.tally.warn_few(counts.sparse, real, least)
    return not few


def observed_rows(
    runtime: Runtime,
    tokens: Tokens | None,
    counts: TokenCounts | None,
    arguments: Mapping[str, object],
) -> list[Tensor]:
    """What is observed of a dense call. Warm-up calls, and those without gradients, run the same
    graphs and do not count."""
    assert runtime.collector is not None
    counting = runtime.call.is_step and torch.is_grad_enabled()
    if counting and runtime.step is not None and runtime.refreshes():
        runtime.collector.reopen(runtime.step[0])
    device = next((v.device for v in arguments.values() if isinstance(v, Tensor)), None)
    device = device or next(runtime.model.parameters()).device
    total = None if counts is None else counts.sparse
    return runtime.collector.begin(tokens, total, device, counting=counting)


def rows_of(arguments: Mapping[str, object]) -> int:
    """How many tokens a call has; 1 where it does not say."""
    for name in ("input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[:2].numel()
    return 1
