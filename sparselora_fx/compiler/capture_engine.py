"""What captures work on a device and does it again: CUDA graphs, behind a small interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sparselora_fx._torch import storage_at

Result = TypeVar("Result")


class Engine(Protocol):
    """What captures and replays: CUDA, or a stand-in."""

    device: str  # type of the devices whose work it captures

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Run a function. Returns another that does the same work again on the same memory, and
        what the function returned; its values are there after a replay."""

    def has_room(self) -> bool:
        """Whether there is memory for a step's values twice: captured, and as usual."""

    def unowned(self, tensor: Tensor) -> Tensor:
        """A captured tensor that does not keep its memory from later captures: to be read at once
        after a replay."""

    def random_state(self) -> Tensor:
        """The state of the device's random numbers."""

    def set_random_state(self, state: Tensor) -> None:
        """Set that state."""


class CudaEngine:
    """CUDA graphs of the present device, in one memory pool."""

    device = "cuda"

    def __init__(self) -> None:
        self.pool: Any = None

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader that pins memory) may do what a capture may not.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def has_room(self) -> bool:
        if self.pool is not None:
            return True
        # What the steps so far needed and gave back is what a step needs.
        step = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] >= step

    def unowned(self, tensor: Tensor) -> Tensor:
        held = tensor.untyped_storage()
        if not held.nbytes():
            return tensor
        storage = storage_at(held.data_ptr(), tensor.device, held.nbytes())
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state)
