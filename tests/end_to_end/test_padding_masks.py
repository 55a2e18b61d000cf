"""What a softmax reads says whether padding is hidden, in whatever order masks and scales come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.rows import (
    BATCH,
    EARLIER,
    LENGTH,
    SHOWN,
    WIDTH,
    Function,
    additive,
    heads,
    labels_of,
    loss_of,
    proves,
    random,
    written_with,
)

BEFORE = EARLIER.tril(-1)  # each token sees those before it, and not itself
BUFFER = torch.full((LENGTH, LENGTH), -1e9, dtype=torch.float64).triu()
SCALE = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))
DISTANCES = nn.Parameter(random(2 * LENGTH, 1, seed=3))
Masking = Callable[[Tensor, Tensor], Tensor]


def filled(s: Tensor, m: Tensor, value: float = -1e9, allowed: Tensor = EARLIER) -> Tensor:
    return s.masked_fill(~(m[:, None, None, :] & allowed), value)


def distances() -> Tensor:
    places = torch.arange(LENGTH)
    return places[:, None] - places[None]


READING: dict[str, Masking] = {
    "a factor behind the mask": lambda s, m: filled(s, m, -1e3) * 0.01,
    "a learned factor behind the mask": lambda s, m: filled(s, m) * SCALE,
    "divided behind the mask": lambda s, m: filled(s, m, -1e4) / 1e3,
    "not low enough": lambda s, m: filled(s, m, -1e3),
    "not low enough for such scores": lambda s, m: filled(1e3 * s, m, -1e4),
    "a little lower": lambda s, m: filled(s, torch.ones_like(m)) - 5.0 * additive(m).sign().abs(),
    "capped behind the mask": lambda s, m: 3 * torch.tanh(filled(s, m) / 3),
    "clamped behind the mask": lambda s, m: filled(s, m).clamp(min=-6),
    "squared behind the mask": lambda s, m: filled(s, m) ** 2,
    "rows that see no key": lambda s, m: filled(s, m, allowed=BEFORE),
    "rows that see no key, in two steps": lambda s, m: filled(s + BUFFER, m),
    "rows that see no key, all lowered": lambda s, m: s + BUFFER + additive(m).clamp(min=-1e9),
    "keys far away alone": lambda s, m: filled(s, m, allowed=distances() >= 2),
    "masked by a product": lambda s, m: s * m[:, None, None, :].double(),
}


@pytest.mark.parametrize("name", READING)
def test_scores_that_leave_padding_its_weight(name: str) -> None:
    fn, x, labels = written_with(READING[name]), random(BATCH, LENGTH, WIDTH), labels_of()
    assert not proves(fn, x, SHOWN, labels)


UNREAD: dict[str, Masking] = {
    "a factor behind a low mask": lambda s, m: filled(s, m) * 0.01,
    "capped and then masked": lambda s, m: filled(3 * torch.tanh(s / 3), m),
    "distances in numbers": lambda s, m: filled(s - 0.3 * distances().abs(), m),
    "distances looked up": lambda s, m: filled(
        s + F.embedding(distances() + LENGTH, DISTANCES).squeeze(-1), m
    ),
    "causal, then padding": lambda s, m: (s + BUFFER.triu(1)) + additive(m),
    "less the largest": lambda s, m: filled(s, m) - filled(s, m).amax(-1, keepdim=True),
}


@pytest.mark.parametrize("name", UNREAD)
def test_scores_that_leave_padding_none(name: str) -> None:
    fn, x, labels = written_with(UNREAD[name]), random(BATCH, LENGTH, WIDTH), labels_of()
    assert proves(fn, x, SHOWN, labels)
    other = torch.where(SHOWN[..., None], x, 7 * random(BATCH, LENGTH, WIDTH, seed=4))
    expected, got = (loss_of(fn, v, SHOWN, labels) for v in (x, other))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def fused_with(mask_of: Callable[[Tensor], Tensor]) -> Function:
    def attend(x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*heads(x), attn_mask=mask_of(mask[:, None, None, :]))

    return attend


@pytest.mark.parametrize(
    ("mask_of", "expected"),
    [
        (lambda m: m & EARLIER, True),
        (lambda m: m & BEFORE, False),
        (lambda m: torch.where(m & EARLIER, 0.0, -1e9).double(), True),
        (lambda m: torch.where(m & BEFORE, 0.0, -1e9).double(), False),
        (lambda m: torch.where(m & EARLIER, 0.0, -1e2).double(), False),
        (lambda m: torch.where(m & EARLIER, 0.0, -1e9).double() * SCALE, False),
    ],
    ids=["false", "false, no key", "low", "low, no key", "not low enough", "scaled"],
)
def test_masks_of_fused_attention(mask_of: Callable[[Tensor], Tensor], expected: bool) -> None:
    fn = fused_with(mask_of)
    assert proves(fn, random(BATCH, LENGTH, WIDTH), SHOWN, labels_of()) is expected
