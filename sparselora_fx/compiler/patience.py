"""A word to whoever waits: a compilation that takes long says that it is under way."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

AFTER = 5.0  # seconds


@contextlib.contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    """Say on stderr that ``what`` is under way once it has taken `AFTER` seconds, and how long it
    took in the end. Progress bars stay whole."""
    start = time.monotonic()
    timer = threading.Timer(AFTER, _say, [f"sparselora_fx: {what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.monotonic() - start
        if seconds >= AFTER:
            _say(f"sparselora_fx: {what}: {seconds:.0f} s")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
