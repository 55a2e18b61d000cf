"""The two matmuls of a LoRA branch, told by what they read and by their shapes."""

from __future__ import annotations

import pytest

from sparselora_fx.analysis.lora import adapter_weights, is_down_projection, is_up_projection
from sparselora_fx.passes.find_sites import find_sites
from tests.support.small_graphs import Small, after


@pytest.mark.parametrize(
    ("out", "inner", "down", "up"),
    [(2, 8, True, False), (8, 2, False, True), (4, 8, False, False), (8, 8, False, False)],
)
def test_told_by_their_shapes(out: int, inner: int, down: bool, up: bool) -> None:
    small = Small()
    w = small.input("w", out, inner, trains=True)
    y = small.linear(small.input("x", 3, inner), w)
    assert (is_down_projection(y, {w}), is_up_projection(y, {w})) == (down, up)
    assert not is_down_projection(y, set()) and not is_up_projection(y, set())


def test_neither_has_a_bias() -> None:
    small = Small()
    w = small.input("w", 2, 8, trains=True)
    y = small.linear(small.input("x", 3, 8), w, small.input("b", 2))
    assert not is_down_projection(y, {w})


def test_weights_of_some_sites() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    y = small.call("add", small.site(x, "w", 16), small.lora(x, "w", 16))
    rewrite = small.rewrite(y, small.lora(x, "other", 16))
    after(rewrite, find_sites)
    assert {w.target for w in adapter_weights(rewrite.sites)} == {"w_A", "w_B"}
    assert adapter_weights([]) == set()
