"""Points in time on a device, without waiting for it."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event


class Timer:
    """The clock of a CPU, whose work is done when a call returns."""

    name = "cpu"

    def now(self) -> Moment:
        """This point in time; on a GPU, the one at which it gets here."""
        return time.perf_counter()

    def passed(self, moment: Moment) -> bool:
        """Whether the device has got to a point in time."""
        return True

    def elapsed_ms(self, start: Moment, end: Moment) -> float:
        """Milliseconds between two points that have passed."""
        assert isinstance(start, float) and isinstance(end, float)
        return 1e3 * (end - start)

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

    def now(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, moment: Moment) -> bool:
        assert isinstance(moment, torch.cuda.Event)
        return bool(moment.query())

    def elapsed_ms(self, start: Moment, end: Moment) -> float:
        assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end))
