"""Count a batch's tokens where it is made, so that no step asks the device for them.

The counts travel with their batch, under a key of their own which the compiled forward takes out
again. They come with what they were counted from (names and shapes of the batch's tensors, the
plan), and a call that does not agree with that counts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparselora_fx.ir.token_lists import TokenCounts, Tokens, count, sums_of
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS
from sparselora_fx.runtime.token_policy import split_tokens

KEY = "sparselora_counts"  # where a batch carries its counts
# The arguments that a token policy reads, see `token_policy.split_tokens`.
_READ = (
    "input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids", "cu_seq_lens",
    "cu_seq_lens_q", OUTPUT_TOKENS,
)  # fmt: skip


@dataclass(frozen=True)
class CountedBatch:
    """What a batch carries: its counts, once as numbers and once as a tensor that moves to the
    device with the batch, where it is compared with what is found there."""

    counts: TokenCounts
    sums: Tensor
    shapes: dict[str, tuple[int, ...]]
    plan: SparsityPlan
    shift: bool | None

    def to(self, *args: Any, **options: Any) -> CountedBatch:
        """As `Tensor.to`."""
        return replace(self, sums=self.sums.to(*args, **options))

    def pin_memory(self, *args: Any) -> CountedBatch:
        """As `Tensor.pin_memory`; a `DataLoader` calls it."""
        return replace(self, sums=self.sums.pin_memory(*args))

    def fits(self, plan: SparsityPlan, arguments: Mapping[str, object], shift: bool | None) -> bool:
        """Whether a call is one that these counts can be of."""
        return self.shapes == _shapes(arguments) and (plan, shift) == (self.plan, self.shift)

    def check(self, tokens: Tokens, labelled: Tensor | None) -> None:
        """Compare the counts with the batch, without waiting for the answer: a batch that was
        changed after it was counted must not train on lists that leave tokens out."""
        found = sums_of(tokens, labelled)
        expected = self.sums.to(found.device, non_blocking=True)[: len(found)]
        torch._assert_async(
            (found == expected).all(),
            "a batch's labels, mask or positions were changed after its tokens were counted; "
            "call sparselora_fx.count_tokens(model, batch) after such changes, or not at all",
        )


def add_counts(batch: MutableMapping[str, object], plan: SparsityPlan, shift: bool | None) -> None:
    """Add to a batch what is counted in it; see `collating.count_tokens`."""
    tensors = [value for value in map(batch.get, _READ) if isinstance(value, Tensor)]
    # A function of the user's need not say the same twice.
    if callable(plan.tokens) or any(t.device.type != "cpu" for t in tensors):
        return
    tokens = split_tokens(plan, batch, shift=shift)
    if tokens is None:
        return
    counts = count(tokens, tokens.labelled)
    sums = torch.tensor(counts.sums())
    batch[KEY] = CountedBatch(counts, sums, _shapes(batch), plan, shift)


def _shapes(arguments: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    values = {name: arguments.get(name) for name in _READ}
    return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor)}
