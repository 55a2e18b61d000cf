"""Warnings that are given once."""

from __future__ import annotations

import warnings


class Notices:
    """What the user of one model has been told."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, text: str, *, about: str = "", stacklevel: int = 3) -> None:
        """Warn, unless that was done.

        Args:
            text: the warning.
            about: what it is about, if its text differs from time to time. The same text, or the
                same subject, is told once.
            stacklevel: as in `warnings.warn`, counted from the caller of this method plus one.
        """
        key = about or text
        if key not in self.given:
            self.given.add(key)
            warnings.warn(text, stacklevel=stacklevel)
