"""A word to whoever waits: a compilation that takes long says that it is under way."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from sparselora_fx.compiler.report import Compilation

log = logging.getLogger(__name__)
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


class Clock:
    """Times the compilations of one model, and says how long the next one may take."""

    def __init__(self) -> None:
        self.known: dict[str, float] = {}  # by kind of graph: seconds for each of its calls

    @contextlib.contextmanager
    def timing(self, compilation: Compilation) -> Iterator[None]:
        """Time one compilation; ``TORCH_LOGS="sparselora_fx"`` shows it, a long one shows anyway.

        The guess goes by an earlier graph of the same kind, per call in it.
        """
        kind, batch = compilation.kind, compilation.batch
        rate = self.known.get(kind)
        guess = f", about {rate * compilation.nodes:.0f} s" if rate else ""
        sizes = f", batch {batch}" if batch else ""
        what = f"compiling: graph {compilation.number} ({kind}){sizes}{guess}"
        log.info("%s", what)
        start = time.monotonic()
        with told_if_slow(what):
            yield
        compilation.seconds = time.monotonic() - start
        self.known[kind] = compilation.seconds / max(1, compilation.nodes)
        log.info("compiled: graph %d in %.1f s", compilation.number, compilation.seconds)
