"""Leave a model as it was: its modes, the random numbers, its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn


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
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(index for index in devices if index is not None)):
        yield


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
