"""A stand-in for CUDA graphs on a CPU: a list of ops, run again on the memory they ran on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Recorder:
    """Records the ops of a call. Each replay runs them on the very tensors of the recording, and
    writes what they give into the very results, which hold NaN in between.

    As with CUDA, a capture leaves no values, and refuses to ask a tensor for one.
    """

    device = "cpu"

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before = torch.get_rng_state()
        mode = _Recording()
        with mode:
            result = run()
        torch.set_rng_state(before)
        mode.poison()

        def replay() -> None:
            self.replays += 1
            mode.poison()
            mode.run()

        return replay, result

    def has_room(self) -> bool:
        return True

    def unowned(self, tensor: Tensor) -> Tensor:
        return tensor

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.fresh: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{func} is not permitted while a stream is captured")
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.calls.append((func, args, kwargs, out))
        self.fresh += [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
        return out

    def poison(self) -> None:
        for tensor in self.fresh:
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))

    @torch.no_grad()
    def run(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
