"""Leave a model as it was: its modes, the random numbers, its buffers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """Where random numbers stand: torch's on the CPU and on some GPUs, Python's and numpy's."""

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: tuple[object, ...]
    numpy: object

    @classmethod
    def on(cls, devices: Iterable[int]) -> RandomState:
        """The present state, on the CPU and these GPUs."""
        cuda = {index: torch.cuda.get_rng_state(index) for index in devices}
        library = sys.modules.get("numpy")
        numpy = None if library is None else library.random.get_state()
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy)

    @classmethod
    def of(cls, values: Iterable[object]) -> RandomState:
        """The present state, on the CPU and the GPUs that hold any of these values."""
        devices = {v.device.index for v in values if isinstance(v, Tensor) and v.is_cuda}
        return cls.on(sorted(index for index in devices if index is not None))

    def now(self) -> RandomState:
        """The present state, on the same devices."""
        return RandomState.on(self.cuda)

    def put(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class ChangingBuffers:
    """The buffers that a model's calls write to: to put them back before a call is made again. All
    are kept at the first call, and later those that it has changed."""

    def __init__(self) -> None:
        self.written: list[Tensor] | None = None  # not known before a call has run to its end
        self.kept: list[tuple[Tensor, Tensor, int]] = []

    def keep(self, model: nn.Module, ours: Iterable[Tensor]) -> None:
        """Keep what they hold; ``ours``: buffers that no call writes to."""
        written = self.written
        if written is None:
            own = {id(buffer) for buffer in ours}
            written = [b for b in model.buffers() if id(b) not in own]
        self.kept = [(b, b.detach().clone(), b._version) for b in written]

    def forget(self) -> None:
        """A call has run to its end: nothing needs to be put back."""
        if self.written is None:
            self.written = [
                buffer for buffer, _, version in self.kept if buffer._version != version
            ]
        self.kept = []

    def put(self) -> None:
        """Let them hold what they held."""
        with torch.no_grad():
            for buffer, value, version in self.kept:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Every module's mode (training or evaluation) is afterwards its own again, also where modules
    of one model differ."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_random_numbers(model: nn.Module) -> Iterator[None]:
    """Random numbers on the CPU and on the model's GPUs go on afterwards as if nothing had been
    drawn."""
    state = RandomState.of(model.parameters())
    try:
        yield
    finally:
        state.put()


@contextmanager
def kept_buffers(model: nn.Module, ours: Set[int]) -> Iterator[None]:
    """The model's buffers hold afterwards what they held, but for those whose ids are ``ours``."""
    kept = [(b, b.detach().clone()) for b in model.buffers() if id(b) not in ours]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
