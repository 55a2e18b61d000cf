"""Bounds of masked scores: padding has no weight where they say so, whatever the scores are."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests.support.masked_scores import Change, added, filled, scores_of
from tests.support.small_graphs import Small

HIDDEN: dict[str, Change] = {
    "filled": filled,
    "added": added,
    "where": lambda s, x, m: s.call(torch.where, m, x, -1e9),
    "scaled before": lambda s, x, m: added(s, s.call(torch.mul, x, 0.1), m),
    "scaled after": lambda s, x, m: s.call(torch.mul, added(s, x, m), 0.5),
    "cast": lambda s, x, m: s.call("to", added(s, x, m), torch.float32),
    "capped before": lambda s, x, m: added(s, s.call(torch.tanh, x), m),
    "with a small bias": lambda s, x, m: added(s, s.call(torch.add, x, s.input("bias", 5)), m),
    "less its largest": lambda s, x, m: s.call(
        torch.sub, added(s, x, m), s.call("amax", added(s, x, m), -1, keepdim=True)
    ),
}  # fmt: skip
SEEN: dict[str, Change] = {
    "without a mask": lambda s, x, m: x,
    "a mask that is too weak": lambda s, x, m: added(s, x, m, -100.0),
    "capped after": lambda s, x, m: s.call(torch.tanh, added(s, x, m)),
    "the wrong way round": lambda s, x, m: s.call("masked_fill", x, m, -1e9),
    "raised": lambda s, x, m: s.call("neg", added(s, x, m)),
    "multiplied": lambda s, x, m: s.call(torch.mul, x, s.call(torch.where, m, 1.0, 0.0)),
    "written over": lambda s, x, m: s.call("mul_", added(s, x, m), 0.0),
    "columns mixed": lambda s, x, m: s.call("cumsum", added(s, x, m), -1),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_padding_has_no_weight(name: str) -> None:
    spans, end, _ = scores_of(HIDDEN[name])
    assert spans.hide(end)


@pytest.mark.parametrize("name", SEEN)
def test_padding_may_have_weight(name: str) -> None:
    spans, end, _ = scores_of(SEEN[name])
    assert not spans.hide(end)


@pytest.mark.parametrize("kind", ["boolean", "additive", "weak", "none"])
def test_masks_of_a_fused_attention(kind: str) -> None:
    low = {"additive": -1e9, "weak": -100.0}

    def mask(small: Small, scores: fx.Node, shown: fx.Node) -> fx.Node:
        return shown if kind == "boolean" else small.call(torch.where, shown, 0.0, low[kind])

    if kind == "none":
        spans, _, _ = scores_of(filled)
        assert not spans.hide_with(None)
        return
    spans, end, _ = scores_of(mask)
    assert spans.hide_with(end) == (kind != "weak")


def test_without_batches_nothing_is_hidden() -> None:
    spans, end, _ = scores_of(filled)
    spans.masks.batches = []
    assert not spans.hide(end)


def test_a_mask_that_cannot_be_computed_hides_nothing() -> None:
    spans, end, _ = scores_of(filled)
    broken = next(n for n in end.graph.nodes if n.target == "logical_not")
    broken.target = "no_such_method"
    assert not spans.hide(end)
