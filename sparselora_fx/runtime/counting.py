"""List a batch's tokens where it is made, so that no step asks the device for their counts, or
lists them itself.

Counts and lists travel with their batch, under a key of their own which the compiled forward takes
out again. They come with what they were made from (names and shapes of the batch's tensors, the
plan), and a call that does not agree with that counts anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
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
from sparselora_fx.model.conventions import Convention
from sparselora_fx.notices import Notices
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS
from sparselora_fx.runtime.token_policy import split_tokens, token_grid

KEY = "sparselora_counts"  # where a batch carries its counts
# The arguments that a token policy reads, see `token_policy.split_tokens`.
_STARTS = ("position_ids", "cu_seq_lens", "cu_seq_lens_q")
_LABELS = ("labels", "shift_labels")
_READ = ("input_ids", "inputs_embeds", "attention_mask", *_LABELS, OUTPUT_TOKENS, *_STARTS)


@dataclass(frozen=True)
class ListedTokens:
    """A batch's tokens under one convention of its labels (`Convention.shift`), and their lists."""

    counts: TokenCounts
    tokens: Tokens
    placed: PlacedTokens

    @staticmethod
    def of(tokens: Tokens) -> ListedTokens:
        """Count and list tokens."""
        placed, totals = place(tokens)
        return ListedTokens(count(totals), tokens, placed)

    def each(self, function: Callable[[Tensor], Tensor]) -> ListedTokens:
        """The same with other tensors."""
        tokens, placed = self.tokens, self.placed
        labelled = None if tokens.labelled is None else function(tokens.labelled)
        sparse, dense = function(tokens.sparse), function(tokens.dense)
        tokens = replace(tokens, sparse=sparse, dense=dense, labelled=labelled)
        placed = PlacedTokens(function(placed.idx), function(placed.pos))
        return replace(self, tokens=tokens, placed=placed)


@dataclass(frozen=True)
class CountedBatch:
    """What a batch carries: its tokens, by the conventions of its labels that a step may ask for,
    and the facts that they were made from, which are compared with what the step finds. It moves
    to a device with the batch."""

    listed: dict[bool | None, ListedTokens]
    facts: list[Tensor]
    shapes: dict[str, tuple[int, ...]]
    plan: SparsityPlan

    def to(self, *args: Any, **options: Any) -> CountedBatch:
        """As `Tensor.to`."""
        return self._each(lambda tensor: tensor.to(*args, **options))

    def pin_memory(self, *args: Any) -> CountedBatch:
        """As `Tensor.pin_memory`; a `DataLoader` calls it."""
        return self._each(lambda tensor: tensor.pin_memory(*args))

    def __getitem__(self, part: object) -> None:
        """Nothing: a part of the batch has other tokens, and its call counts them. For code that
        cuts every value of a batch."""

    __iter__ = None  # else a loop would ask for parts without end

    def _each(self, function: Callable[[Tensor], Tensor]) -> CountedBatch:
        listed = {shift: own.each(function) for shift, own in self.listed.items()}
        return replace(self, listed=listed, facts=list(map(function, self.facts)))

    def fits(self, plan: SparsityPlan, arguments: Mapping[str, object], shift: bool | None) -> bool:
        """Whether a call is one that these tokens can be of."""
        return self.shapes == _shapes(arguments) and plan == self.plan and shift in self.listed

    def holds(self, arguments: Mapping[str, object], grid: Tensor, comparison: Comparison) -> bool:
        """Whether what they were made from is what a call has."""
        facts = [fact.to(grid.device) for fact in self.facts]
        return comparison.holds(facts, _facts(arguments, grid, self.plan))


class Comparison:
    """Compares counted batches with those that steps get: a ``compute_loss`` may mask labels.

    A GPU is waited for once, in the first comparison. The others are asked for when they are there,
    a step or two later. A batch on a CPU is looked at at once.

    Attributes:
        trusted: counts of the data loader are used.
    """

    def __init__(self, notices: Notices) -> None:
        self.trusted = True
        self.notices = notices
        self._waited = False
        self._open: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def holds(self, mine: list[Tensor], found: list[Tensor]) -> bool:
        """Whether two lists of facts are the same, as far as is known now."""
        if not mine:
            return True
        if mine[0].device.type == "cpu":
            pairs = zip(mine, found, strict=True)
            return all(numpy.array_equal(a.numpy(), b.numpy()) for a, b in pairs)
        same = torch.stack([(a == b).all() for a, b in zip(mine, found, strict=True)]).all()
        if self._waited and same.device.type == "cuda":
            return self._later(same)
        self._waited = True
        return bool(same) or self._distrust("in this step")

    def _later(self, same: Tensor) -> bool:
        """Ask for an answer, and look at those that are there."""
        self._open.append(_on_its_way(same))
        while self._open and self._open[0][1].query():
            if not bool(self._open.popleft()[0]):
                return self._distrust("in a step before this one, which may have left tokens out")
        return True

    def _distrust(self, when: str) -> bool:
        self.trusted = False
        self.notices.warn(
            "a batch's labels, mask or positions were changed after its data loader had counted "
            f"its tokens, {when}: from now on each step counts its own, and waits for the GPU. "
            "Change batches in the collator, or call sparselora_fx.count_tokens(model, batch) "
            "behind the change while the batch is on the CPU"
        )
        return False


def _on_its_way(answer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A value of a GPU that is being copied to the host, and what tells that it is there."""
    host = torch.empty((), dtype=answer.dtype, pin_memory=True).copy_(answer, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def shifts_of(convention: Convention, *, own_loss: bool) -> tuple[bool | None, ...]:
    """The conventions that steps may ask for: a loss that is not the model's is none that graphs
    show (``own_loss``), and that of a model which nobody knows is learned."""
    if convention.said:
        return (convention.assumed,)
    if own_loss:
        return (None,)
    return (None, True, False) if convention.shift is None else (convention.shift,)


def add_counts(
    batch: MutableMapping[str, object], plan: SparsityPlan, shifts: Sequence[bool | None]
) -> None:
    """Add to a batch what is counted in it; see `collating.count_tokens`."""
    batch.pop(KEY, None)  # of the batch as it was
    tensors = [value for value in map(batch.get, _READ) if isinstance(value, Tensor)]
    # A function of the user's need not say the same twice.
    if callable(plan.tokens) or any(t.device.type != "cpu" for t in tensors):
        return
    found, grid = {s: split_tokens(plan, batch, shift=s) for s in shifts}, token_grid(batch)
    listed = {s: ListedTokens.of(tokens) for s, tokens in found.items() if tokens is not None}
    if grid is not None and listed:
        facts = [fact.clone() for fact in _facts(batch, grid, plan)]
        batch[KEY] = CountedBatch(listed, facts, _shapes(batch), plan)


def _facts(arguments: Mapping[str, object], grid: Tensor, plan: SparsityPlan) -> list[Tensor]:
    """What `split_tokens` makes of a batch's values: which labels count, which tokens are shown or
    named; where samples begin, for a plan that asks."""
    values = {name: arguments.get(name) for name in (*_LABELS, "attention_mask", OUTPUT_TOKENS)}
    given = {
        name: value.to(grid.device)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.shape == grid.shape
    }
    asked = [v != IGNORED if name in _LABELS else v != 0 for name, v in given.items()]
    facts = [torch.stack(asked)] if asked else []
    starts = [arguments.get(name) for name in _STARTS] if plan.sink_tokens else []
    return facts + [value.to(grid.device) for value in starts if isinstance(value, Tensor)]


def _shapes(arguments: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    values = {name: arguments.get(name) for name in _READ}
    return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor)}
