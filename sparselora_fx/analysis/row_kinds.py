"""What the rows of an activation may be: the batch's tokens, some of them, or more than them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Whole:
    """The batch's tokens ``[B, L]``, as they are."""


@dataclass(frozen=True)
class Part:
    """Some of other rows: ``rows[:, kept]``."""

    rows: TokenRows
    start: object
    stop: object
    step: object


@dataclass(frozen=True)
class Joined:
    """Rows one behind the other; a node stands for rows that are no tokens of the batch."""

    parts: tuple[TokenRows | fx.Node, ...]


TokenRows = Whole | Part | Joined
