"""Training steps as users run them, timed: peers that take turns.

Base weights in bf16 run under autocast, with adapters in fp32, as transformers' Trainer does with
``bf16=True``. On a GPU nothing waits inside a step or between the steps of a turn: a turn is a few
steps between two waits, as in a training loop. What is told of forward, backward and optimizer is
there the time that the host takes to issue them; only ``step`` is what a user waits for.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import sparselora_fx as slx
from benchmarks.support import measuring

PHASES = ("forward", "backward", "optimizer")
STEPS_OF_A_TURN = {"cuda": 4, "cpu": 1}
Batch = dict[str, Any]


class Peer:
    """A model that trains, with its optimizer and the times of its turns, in seconds a step.

    Args:
        name: as in `benchmarks.support.peers`.
        model: on the device it trains on.
        clock: "wall" or "cpu", see `measuring.now`.
        autocast: the dtype that steps run in under autocast; None: without.
    """

    def __init__(
        self, name: str, model: nn.Module, clock: str = "wall", autocast: torch.dtype | None = None
    ) -> None:
        self.name, self.model, self.clock, self.autocast = name, model, clock, autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device.type
        fast = {"fused": True} if self.device == "cuda" else {"foreach": True}
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, **fast)
        self.times: list[dict[str, float]] = []
        self.loaded: dict[int, tuple[Batch, Batch]] = {}  # by id: a batch, and as it is loaded

    def as_loaded(self, batch: Batch) -> Batch:
        """A batch as a data loader hands it to this peer: to ours with its tokens counted, which
        `SparsityCallback` sees to in the Trainer, before it moves to the device. Made once."""
        if not self.name.startswith("ours"):
            return batch
        key = id(batch)
        if key not in self.loaded:
            tensors = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            counted = slx.count_tokens(self.model, tensors)
            more = {n: v.to(self.device) for n, v in counted.items() if n not in batch}
            self.loaded[key] = batch, {**batch, **more}
        return self.loaded[key][1]

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch."""
        batch = self.as_loaded(batch)
        context: Any = contextlib.nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device, self.autocast)
        with context:
            loss: torch.Tensor = self.model(**batch).loss
        return loss

    def issue(self, batch: Batch) -> list[float]:
        """One training step, without waiting for the device; the clock at each phase's end."""
        if "cudagraphs" in self.name:
            torch.compiler.cudagraph_mark_step_begin()
        marks = [measuring.tick(self.clock)]
        loss = self.forward(batch)
        marks.append(measuring.tick(self.clock))
        loss.backward()
        marks.append(measuring.tick(self.clock))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*marks, measuring.tick(self.clock)]

    def turn(self, batches: Sequence[Batch]) -> dict[str, float]:
        """A step on each batch between two waits: mean seconds of a step, and of its phases."""
        start = measuring.now(self.clock)
        marks = [self.issue(batch) for batch in batches]
        took = measuring.now(self.clock) - start
        spent = [[b - a for a, b in itertools.pairwise(step)] for step in marks]
        means = (statistics.mean(phase) for phase in zip(*spent, strict=True))
        return {**dict(zip(PHASES, means, strict=True)), "step": took / len(batches)}

    def step(self, batch: Batch) -> dict[str, float]:
        """A turn of one step."""
        return self.turn([batch])

    def gradient_norm(self, batch: Batch) -> tuple[float, float]:
        """Loss, and the norm of all gradients, of a batch. Waits; changes no parameter."""
        if "cudagraphs" in self.name:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.forward(batch)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), norm

    def median(self, phase: str) -> float:
        """Median time of a phase."""
        return statistics.median(taken[phase] for taken in self.times)


def take_turns(
    running: Sequence[Peer], batches: Sequence[Batch], pairs: int, seconds: float
) -> int:
    """Time every peer ``pairs`` times, in turns, until the time is up. Returns the turns made."""
    end = time.monotonic() + seconds
    for turn in range(pairs):
        if turn >= 3 and time.monotonic() > end:
            return turn
        for peer in running:
            count = STEPS_OF_A_TURN[peer.device]
            first = turn * count
            chosen = [batches[(first + i) % len(batches)] for i in range(count)]
            peer.times.append(peer.turn(chosen))
    return pairs


def ratio(peer: Peer, baseline: Peer) -> float:
    """Median over turns of the baseline's step time over the peer's."""
    pairs = zip(baseline.times, peer.times, strict=True)
    return statistics.median(b["step"] / p["step"] for b, p in pairs)
