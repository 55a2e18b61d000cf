"""`flex_attention` is an attention like any other. Only its forward is compared: torch refuses its
backward on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import sparselora_fx as slx
from tests.support import oracle
from tests.support.adapted_nets import build
from tests.support.attention_nets import attention, heads, merged


def plain(net: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
    return net.o(merged(flex_attention(q, k, v, enable_gqa=True)))


def capped(net: Any, x: Tensor) -> Tensor:
    """Scores are capped and biased by distance, in a function of their own."""
    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))

    def score(s: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 5 * torch.tanh(s / 5) - 0.1 * (i - j).abs()

    return net.o(merged(flex_attention(q, k, v, score_mod=score, enable_gqa=True)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("body", [plain, capped])
def test_flex_attention_is_sliced(body: Callable[..., Tensor]) -> None:
    model, x = build(attention(body))
    model, x = model.float().requires_grad_(False), x.float()
    for name in "qkvo":  # without adapters: what trains would ask for the backward
        setattr(model, name, getattr(model, name).base)
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.5), backend="aot_eager")
    with slx.record(model) as record:
        got = model(x)
    table = slx.explain(model, verbose=True)
    slx.restore(model)
    assert set(record.sites) == set("qkvo"), table
    with torch.no_grad(), oracle.masked_reference(model, record):
        expected = model(x)
    assert oracle.difference(got, expected) <= 1e-6
