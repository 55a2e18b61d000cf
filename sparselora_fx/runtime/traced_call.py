"""What is known of a model's call when one of its graphs is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.text_part import beside_text
from sparselora_fx.rewrite.rewrite import TracedCall


def traced_call(
    model: nn.Module, frozen: list[FrozenWeight], arguments: Mapping[str, Tensor],
    inputs: Sequence[object],
) -> TracedCall:  # fmt: skip
    """The call's arguments, and what of the model a graph's inputs hold.

    Args:
        arguments: the call's tensors, by name.
        inputs: the graph's.
    """
    beside = beside_text(model, frozen)

    def among(tensors: Iterable[Tensor | None]) -> frozenset[int]:
        ids = {id(tensor) for tensor in tensors if tensor is not None}
        return frozenset(i for i, value in enumerate(inputs) if id(value) in ids)

    return TracedCall(
        arguments, frozen=among(w.traced for w in frozen), buffers=among(model.buffers()),
        beside_text=among(w.traced for w in frozen if w.name in beside),
    )  # fmt: skip
