"""Which rows of a dense call are observed: few, evenly spaced, and each token as likely as another.

Systematic sampling: with T tokens and n places, place i takes token ``floor((i + u) T / n)``, one
``u`` in [0, 1) for the whole call. Without u the first token of the batch would be in every sample,
and first tokens are outliers in many models. ``u`` follows the golden ratio (an additive recurrence
fills [0, 1) evenly, whatever the number of calls), so that nothing is drawn: the random numbers of
training stay what they are without calibration, and a resumed run takes the tokens it would have
taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselora_fx.ir.token_lists import Tokens

ROWS = 256  # observed per input and call
_PARTS = 1 << 20  # of a place, so that all is integer arithmetic, exact on every device
SPAN = ROWS * _PARTS
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Picked:
    """What a graph is told, and how many rows of a token grid are real (the rest is filling).

    Attributes:
        tensors: ``[places]``, or ``[places, counted, idx]`` where the batch has a token grid:
            ``places`` int64[ROWS], token T * places // SPAN; ``counted`` bool[B, L]; ``idx``
            int64[ROWS] of flat token indices, ascending, then zeros.
        count: min(ROWS, counted tokens); 0 without a grid.
    """

    tensors: list[Tensor]
    count: int


def pick(
    tokens: Tokens | None, device: torch.device, call: int, total: int | None = None
) -> Picked:
    """The rows to observe of one call, the ``call``-th that is observed.

    Args:
        tokens: its sparse tokens are sampled; None: the batch has no token grid, and every input
            is sampled over all its rows.
        device: where the batch is.
        total: how many tokens are sparse; None: it is asked of the device.
    """
    offset = int((call * _GOLDEN) % 1.0 * _PARTS)
    places = torch.arange(ROWS, device=device) * _PARTS + offset
    if tokens is None:
        return Picked([places], 0)
    total = int(tokens.sparse.sum()) if total is None else total
    where = torch.nonzero_static(tokens.sparse.flatten(), size=total).squeeze(1)
    idx = torch.zeros(ROWS, dtype=torch.int64, device=device)
    if total > ROWS:
        idx = where[places * total // SPAN]
    else:
        idx[:total] = where
    return Picked([places, tokens.sparse, idx], min(total, ROWS))


def distinct(rows: Tensor, taken: Tensor) -> Tensor:
    """``rows[n, K]`` without those that repeat: of ascending ``taken[n]`` each index once."""
    fresh = torch.ones_like(taken, dtype=torch.bool)
    fresh[1:] = taken[1:] != taken[:-1]
    return rows[fresh]
