"""List a batch's tokens where it is made, so that no step asks the device for their counts, or
lists them itself.

Counts and lists travel with their batch, under a key of their own which the compiled forward takes
out again. They come with what they were made from (names and shapes of the batch's tensors, the
plan), and a call that does not agree with that counts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparselora_fx.ir.token_lists import (
    IGNORED,
    PlacedTokens,
    TokenCounts,
    Tokens,
    count,
    place,
)
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS
from sparselora_fx.runtime.token_policy import split_tokens, token_grid

KEY = "sparselora_counts"  # where a batch carries its counts
# The arguments that a token policy reads, see `token_policy.split_tokens`.
_STARTS = ("position_ids", "cu_seq_lens", "cu_seq_lens_q")
_READ = ("input_ids", "inputs_embeds", "attention_mask", "labels", OUTPUT_TOKENS, *_STARTS)


@dataclass(frozen=True)
class CountedBatch:
    """What a batch carries: its counts, and tensors that move to the device with the batch: its
    tokens, their lists, and the facts that these were made from, which are compared with what is
    found there."""

    counts: TokenCounts
    tokens: Tokens
    placed: PlacedTokens
    facts: list[Tensor]
    shapes: dict[str, tuple[int, ...]]
    plan: SparsityPlan
    shift: bool | None

    def to(self, *args: Any, **options: Any) -> CountedBatch:
        """As `Tensor.to`."""
        return self._each(lambda tensor: tensor.to(*args, **options))

    def pin_memory(self, *args: Any) -> CountedBatch:
        """As `Tensor.pin_memory`; a `DataLoader` calls it."""
        return self._each(lambda tensor: tensor.pin_memory(*args))

    def _each(self, function: Callable[[Tensor], Tensor]) -> CountedBatch:
        tokens, placed = self.tokens, self.placed
        return replace(
            self,
            tokens=replace(
                tokens,
                sparse=function(tokens.sparse),
                dense=function(tokens.dense),
                labelled=None if tokens.labelled is None else function(tokens.labelled),
            ),
            placed=PlacedTokens(function(placed.idx), function(placed.pos)),
            facts=list(map(function, self.facts)),
        )

    def fits(self, plan: SparsityPlan, arguments: Mapping[str, object], shift: bool | None) -> bool:
        """Whether a call is one that these counts can be of."""
        return self.shapes == _shapes(arguments) and (plan, shift) == (self.plan, self.shift)

    def on(self, arguments: Mapping[str, object]) -> CountedBatch:
        """The same on the device of a call's tokens. The call's facts are compared with these,
        without waiting for the answer: a batch that was changed after it was counted must not train
        on lists that leave tokens out."""
        grid = token_grid(arguments)
        assert grid is not None
        moved = self if self.tokens.sparse.device == grid.device else self.to(grid.device)
        for mine, found in zip(moved.facts, _facts(arguments, grid, self.plan), strict=True):
            torch._assert_async(
                (mine == found).all(),
                "a batch's labels, mask or positions were changed after its tokens were counted; "
                "call sparselora_fx.count_tokens(model, batch) after such changes, or not at all",
            )
        return moved


def add_counts(batch: MutableMapping[str, object], plan: SparsityPlan, shift: bool | None) -> None:
    """Add to a batch what is counted in it; see `collating.count_tokens`."""
    tensors = [value for value in map(batch.get, _READ) if isinstance(value, Tensor)]
    # A function of the user's need not say the same twice.
    if callable(plan.tokens) or any(t.device.type != "cpu" for t in tensors):
        return
    tokens, grid = split_tokens(plan, batch, shift=shift), token_grid(batch)
    if tokens is None or grid is None:
        return
    facts = [fact.clone() for fact in _facts(batch, grid, plan)]
    batch[KEY] = CountedBatch(
        count(tokens), tokens, place(tokens), facts, _shapes(batch), plan, shift
    )


def _facts(arguments: Mapping[str, object], grid: Tensor, plan: SparsityPlan) -> list[Tensor]:
    """What `split_tokens` makes of a batch's values: which labels count, which tokens are shown or
    named; where samples begin, for a plan that asks."""
    values = {name: arguments.get(name) for name in ("labels", "attention_mask", OUTPUT_TOKENS)}
    given = {
        name: value.to(grid.device)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.shape == grid.shape
    }
    asked = [v != IGNORED if name == "labels" else v != 0 for name, v in given.items()]
    facts = [torch.stack(asked)] if asked else []
    starts = [arguments.get(name) for name in _STARTS] if plan.sink_tokens else []
    return facts + [value.to(grid.device) for value in starts if isinstance(value, Tensor)]


def _shapes(arguments: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    values = {name: arguments.get(name) for name in _READ}
    return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor)}
