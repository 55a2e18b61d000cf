"""Points in time on a device, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Timer:
    """The clock of a CPU, whose work is done when a call returns."""

    name = "cpu"

    def now(self) -> Any:
        """This point in time; on a GPU, the one at which it gets here."""
        return time.perf_counter()

    def passed(self, moment: Any) -> bool:
        """Whether the device has got to a point in time."""
        return True

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two points that have passed."""
        return 1e3 * float(end - start)

    @staticmethod
    def of(device: torch.device) -> Timer | None:
        """The clock of a device; None where there is none."""
        if device.type == "cuda":
            return _Events(device)
        return Timer() if device.type == "cpu" else None


class _Events(Timer):
    """CUDA events, on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, moment: Any) -> bool:
        return bool(moment.query())

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))
