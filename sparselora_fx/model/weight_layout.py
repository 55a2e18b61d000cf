"""Lay out frozen weights for their gathers, in place: same values, shape, dtype and ``state_dict``.

A producer ``w[N, K]`` is read by row, a consumer by column. A column of a row-major weight is N
scattered elements; stored as a transposed view of a ``[K, N]`` buffer it is one contiguous row,
which a kernel loads 16 bytes at a time. Nothing but the strides of the parameter changes. The
layout must be chosen before a graph is traced (compiled code assumes strides), when roles are not
known for certain; a wrong guess costs speed, nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparselora_fx._torch import storage_uses
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.opaque import is_foreign


@dataclass
class GatherLayout:
    """The weights whose strides were changed, so that `restore` can change them back."""

    changed: list[nn.Parameter] = field(default_factory=list)

    def apply(
        self,
        model: nn.Module,
        frozen: Sequence[FrozenWeight],
        *,
        devices: tuple[str, ...] = ("cuda",),
    ) -> int:
        """Lay out weights that are gathered across their rows; one at a time. Returns how many were
        changed.

        Only devices where it pays are touched: on a CPU another layout takes another matmul kernel,
        whose sums may round differently, and evaluation must stay bit for bit what it was. Tied
        weights, and weights whose memory anything else refers to, are left alone.
        """
        before = len(self.changed)
        owners = _holders(model)
        for found in gathered_across(frozen):
            weight = found.weight
            alone = owners[weight.untyped_storage().data_ptr()] == 1 and not found.shared
            if (
                weight.device.type in devices
                and alone
                and weight.is_contiguous()
                and is_private(weight)
            ):
                _store(weight, weight.detach().t().contiguous().t())
                self.changed.append(weight)
        return len(self.changed) - before

    def restore(self) -> None:
        """Store by row again what `apply` changed and nothing else has changed since; one at a
        time."""
        for weight in self.changed:
            if weight.dim() == 2 and weight.t().is_contiguous() and not weight.is_contiguous():
                _store(weight, weight.detach().contiguous())
        self.changed.clear()


def gathered_across(frozen: Sequence[FrozenWeight]) -> list[FrozenWeight]:
    """Weights whose gather would cross the rows they are stored in: consumers, or producers stored
    ``[K, N]``."""
    consumers = {id(weight) for weight in likely_consumers(frozen)}
    return [weight for weight in frozen if (id(weight) in consumers) != weight.transposed]


def likely_consumers(frozen: Iterable[FrozenWeight]) -> list[FrozenWeight]:
    """The last linear of each module that holds several, if it maps back to what the others read.

    ``mlp: gate[I, D], up[I, D], down[D, I] -> down``; ``attn: q[H, D], k[G, D], v[G, D], o[D, H] ->
    o``. Of three that are square and alike none is: they are queries, keys and values whose
    projection back lies in another module, as BERT's does.
    """
    siblings: dict[str, list[FrozenWeight]] = defaultdict(list)
    for weight in frozen:
        siblings[weight.canonical.rpartition(".")[0]].append(weight)
    found = []
    for *others, last in siblings.values():
        shapes = {(weight.out_features, weight.in_features) for weight in (*others, last)}
        if len(others) == 2 and len(shapes) == 1:
            continue
        reads = {weight.in_features for weight in others}
        widest = max((weight.out_features for weight in others), default=0)
        if reads == {last.out_features} and last.in_features <= widest:
            found.append(last)
    return found


def is_private(weight: torch.Tensor) -> bool:
    """Whether a plain frozen parameter alone uses all of its storage, so that a new storage cuts no
    tie.

    False for a subclass (quantised, sharded), for a view of a larger buffer (flattened parameters,
    files mapped into memory) and for memory that another tensor refers to or that processes share.
    """
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dim() != 2:
        return False
    if weight.is_meta or (weight.device.type == "cpu" and weight.is_shared()):
        return False
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return alone and storage_uses(weight) == storage_uses(torch.empty(1))


def _holders(model: nn.Module) -> dict[int, int]:
    """How many parameters and buffers of a model, counted once per module, hold each storage."""
    count: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not tensor.is_meta and not is_foreign(tensor):
                count[tensor.untyped_storage().data_ptr()] += 1
    return count


def _store(weight: nn.Parameter, values: torch.Tensor) -> None:
    """Point a parameter at other memory with the same values; the object stays, and its old memory
    is freed."""
    weight.data = values
