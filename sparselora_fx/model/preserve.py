"""Leave a model as it was: its modes, the random numbers, its buffers."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

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
        return cls(torch.get_rng_state(), cuda, random.getstate(), _numpy.now())

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
            _numpy.forget()


class _NumpyState:
    """Where numpy's global generator stands.

    To ask takes as long as ten small operations of torch, and hardly any model draws from it: where
    the memory of the generator is what it was when it was asked last, the answer is, too.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: dict[str, object] = {}

    def now(self) -> object:
        """The state, as ``numpy.random.get_state(legacy=False)`` has it; None without numpy."""
        library = sys.modules.get("numpy")
        if library is None:
            return None
        memory = self._held(library.random)
        # A normal number that is kept for the next call is not in that memory.
        if not memory or memory != self._memory or self._state["has_gauss"]:
            self._memory, self._state = memory, library.random.get_state(legacy=False)
        return self._state

    def forget(self) -> None:
        """The generator was put elsewhere: ask it again."""
        self._memory = b""

    @staticmethod
    def _held(random: ModuleType) -> bytes:
        """What a Mersenne twister holds, 624 words and the place of the next; of others nothing."""
        found = getattr(random, "get_bit_generator", None)  # from numpy 1.24 on
        generator = None if found is None else found()
        if generator is None or type(generator).__name__ != "MT19937":
            return b""
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4)


_numpy = _NumpyState()


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
