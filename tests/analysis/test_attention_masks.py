"""Attention that hides padding, fused or written out."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparselora_fx.analysis.attention_masks import hides_padding, key_axis
from sparselora_fx.analysis.score_spans import ScoreSpans
from tests.support.masked_scores import Change, filled, scores_of
from tests.support.small_graphs import Small


def attention_of(change: Change, *, fused: bool) -> tuple[ScoreSpans, dict[str, fx.Node]]:
    named: dict[str, fx.Node] = {}

    def build(small: Small, scores: fx.Node, shown: fx.Node) -> fx.Node:
        q, turned = scores.args
        k = turned.args[0]  # type: ignore[union-attr]
        v = small.input("v", 2, 3, 5, 4)
        named.update(q=q, k=k, v=v, turned=turned, scores=scores)  # type: ignore[arg-type]
        if fused:
            out = small.call(torch.nn.functional.scaled_dot_product_attention, q, k, v, shown)
        else:
            weights = small.call("softmax", change(small, scores, shown), -1)
            out = small.call(torch.matmul, weights, v)
        named["out"] = out
        return out

    return scores_of(build)[0], named


def test_a_fused_attention_hides_keys_and_values() -> None:
    spans, n = attention_of(filled, fused=True)
    assert hides_padding(n["out"], n["k"], spans) and hides_padding(n["out"], n["v"], spans)
    assert not hides_padding(n["out"], n["q"], spans)
    assert key_axis(n["out"], n["v"], spans) == 2


def test_both_products_of_one_that_is_written_out() -> None:
    spans, n = attention_of(filled, fused=False)
    assert hides_padding(n["scores"], n["turned"], spans)
    assert hides_padding(n["out"], n["v"], spans)
    assert not hides_padding(n["scores"], n["q"], spans)
    assert key_axis(n["scores"], n["turned"], spans) == 3
    assert key_axis(n["out"], n["v"], spans) == 2


def test_one_without_a_mask_hides_nothing() -> None:
    spans, n = attention_of(lambda s, x, m: x, fused=False)
    assert not hides_padding(n["scores"], n["turned"], spans)
    assert not hides_padding(n["out"], n["v"], spans)


@pytest.mark.parametrize(
    ("between", "hidden"),
    [
        (lambda s, x: s.call(torch.nn.functional.dropout, x, 0.1), True),
        (lambda s, x: s.call("to", x, torch.float32), True),
        (lambda s, x: s.call(torch.add, x, 0.1), False),
        (lambda s, x: s.call("flip", x, [-1]), False),
    ],
    ids=["dropout", "a cast", "weights are raised", "columns move"],
)
def test_between_softmax_and_values(between: object, hidden: bool) -> None:
    """Zeros must stay zeros, where they are."""

    def build(small: Small, scores: fx.Node, shown: fx.Node) -> fx.Node:
        weights = small.call("softmax", filled(small, scores, shown), -1)
        changed = between(small, weights)  # type: ignore[operator]
        v = small.input("v", 2, 3, 5, 4, dtype=changed.meta["example_value"].dtype)
        return small.call(torch.matmul, changed, v)

    spans, out, _ = scores_of(build)
    assert hides_padding(out, out.args[1], spans) == hidden  # type: ignore[arg-type]
