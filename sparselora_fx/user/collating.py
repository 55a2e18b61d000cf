"""Count and list tokens where batches are made: in a data loader's collator, or in a loop of your
own."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from sparselora_fx.errors import CompileError
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.runtime.counting import add_counts, shifts_of
from sparselora_fx.runtime.runtime import get_runtime


@dataclass(frozen=True)
class CountingCollator:
    """A data loader's ``collate_fn`` whose batches carry their counts."""

    collate: Callable[..., object]
    plan: SparsityPlan
    shifts: tuple[bool | None, ...]

    def __call__(self, *args: object, **options: object) -> object:
        batch = self.collate(*args, **options)
        if isinstance(batch, MutableMapping):
            add_counts(batch, self.plan, self.shifts)
        return batch


def count_tokens(
    model: nn.Module, batch: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    """Count and list a batch's tokens while it is on the CPU, so that no step waits for the GPU to
    count them, or lists them itself.

    For training loops of your own, before the batch moves to the device (`SparsityCallback` does it
    in the Trainer's data loader)::

        for batch in loader:
            batch = slx.count_tokens(model, batch)
            batch = {name: value.to("cuda") for name, value in batch.items()}
            loss = model(**batch).loss

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, by name. It gets one entry more, which has ``to`` and
            ``pin_memory`` as tensors have; the model's own forward never sees it.

    Returns:
        The same batch. It is left as it is where there is nothing to count: no token grid, a plan
        whose ``tokens`` is a function, tensors on a GPU already.

    Raises:
        CompileError: the model is not compiled, or the batch is no dict.
    """
    runtime = get_runtime(model)
    if not isinstance(batch, MutableMapping):
        raise CompileError(
            f"count_tokens got a {type(batch).__name__}; it takes the model's keyword arguments by "
            "name, a dict that it adds an entry to"
        )
    if not runtime.every_token:
        add_counts(batch, runtime.plan, (runtime.convention.shift,))
    return batch


def count_in_loader(model: nn.Module, loader: Any, *, own_loss: bool) -> Callable[[], None]:
    """Let a data loader (or what accelerate has wrapped around one) count the tokens of its
    batches. ``own_loss``: the loss is not the model's. Returns a function that undoes it."""
    runtime = get_runtime(model)
    # What accelerate dispatches from one process to all, it cuts and joins: tensors only.
    dispatched = hasattr(type(loader), "_fetch_batches")
    while "base_dataloader" in getattr(loader, "__dict__", {}):
        loader = loader.base_dataloader
    if runtime.every_token or dispatched or not isinstance(loader, DataLoader):
        return lambda: None
    before = loader.collate_fn
    shifts = shifts_of(runtime.convention, own_loss=own_loss)
    loader.collate_fn = CountingCollator(before, runtime.plan, shifts)

    def undo() -> None:
        loader.collate_fn = before

    return undo
