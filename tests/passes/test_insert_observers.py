"""In the dense phase, a graph returns a few rows of what each marked weight reads."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparselora_fx.estimator.sample_rows import SPAN
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.insert_observers import insert_observers
from tests.support.small_graphs import (
    F64,
    Small,
    after,
    changes_nothing,
    keeps_values,
    shown,
    text,
    values_of,
)


def observed(small: Small, x: fx.Node, name: str, picked: list[fx.Node]) -> fx.Node:
    w = small.input(name, 4, x.meta["example_value"].shape[-1])
    return small.linear(small.call(OPS.observed.default, x, w, picked), w)


def picked_in(small: Small, samples: int, length: int) -> list[fx.Node]:
    """Places, the tokens that count, and the indices of the picked rows."""
    places = small.input("places", 2, dtype=torch.int64)
    counted = small.input("counted", samples, length, dtype=torch.bool)
    return [places, counted, small.input("idx", 2, dtype=torch.int64)]


def test_weights_of_one_input_share_its_rows() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    picked = picked_in(small, 2, 3)
    ends = [observed(small, x, name, picked) for name in ("q", "k")]
    rewrite = small.rewrite(small.call(torch.add, *ends))
    given = {"idx": torch.tensor([4, 1])}
    assert keeps_values(rewrite, insert_observers, **given) == 1
    assert text(rewrite) == shown("""
        v0 = detach(x)
        v1 = flatten(v0, 0, -2)
        v2 = index_select(v1, 0, idx)
        v3 = linear(x, q, None)
        v4 = linear(x, k, None)
        v5 = add(v3, v4)
        return (v5)
    """)
    (found,) = rewrite.observed
    assert [w.name for w in found.weights] == ["q", "k"] and found.kn == (False, False)
    assert found.taken is None
    rewrite.graph.output_node().args = ((found.rows,),)
    given["x"] = torch.randn(2, 3, 8, dtype=F64)
    (rows,) = values_of(rewrite, **given)
    assert torch.equal(rows, given["x"].flatten(0, 1)[[4, 1]])
    changes_nothing(rewrite, insert_observers)


@pytest.mark.parametrize("tokens", [0, 7])
def test_rows_that_are_not_the_batch_s_tokens_are_spread_over_all(tokens: int) -> None:
    """``places * T // SPAN``; an input without rows gives rows of zeros."""
    small = Small()
    x = small.input("x", tokens, 8)
    rewrite = small.rewrite(observed(small, x, "w", picked_in(small, 2, 3)))
    assert after(rewrite, insert_observers) == 1
    (found,) = rewrite.observed
    assert found.taken is not None
    rewrite.graph.output_node().args = ((found.rows, found.taken),)
    places = torch.tensor([0, SPAN - 1])
    given = torch.randn(tokens, 8, dtype=F64)
    rows, taken = values_of(rewrite, x=given, places=places)
    assert taken.tolist() == [0, max(tokens - 1, 0)]
    expected = given[taken] if tokens else torch.zeros(2, 8, dtype=F64)
    assert torch.equal(rows, expected)


def test_a_computed_weight_and_a_vector_are_left_out() -> None:
    small = Small()
    x, picked = small.input("x", 2, 3, 8), picked_in(small, 2, 3)
    computed = small.call("mul", small.input("v", 4, 8), 2.0)
    y = small.linear(small.call(OPS.observed.default, x, computed, picked), computed)
    z = observed(small, small.input("vector", 8), "w", picked[:1])
    rewrite = small.rewrite(y, z)
    assert keeps_values(rewrite, insert_observers) == 0
    assert not rewrite.observed and "observed" not in text(rewrite)
