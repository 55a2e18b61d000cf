"""What is asked of values: where they come from, and whether a node completes its site."""

from __future__ import annotations

import torch

from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.analysis.channel_values import Channels, attention_of, completes_site, sources_of
from sparselora_fx.passes.find_sites import find_sites
from tests.support.small_graphs import Small, after


def test_sources_of_every_kind_of_value() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    y, z = small.site(x, "y", 12), small.site(x, "z", 12)
    pieces = small.call("chunk", y, 2, -1)
    scores = small.call(torch.matmul, y, small.call("transpose", z, 1, 2))
    rewrite = small.rewrite(pieces, scores)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    first, second = rewrite.sites
    assert sources_of(values[pieces]) == {first}
    assert sources_of(values[scores]) == {first, second}
    assert sources_of(None) == frozenset()


def test_the_one_attention_of_a_value() -> None:
    assert attention_of(Channels((), frozenset())) is None


def test_what_completes_a_site() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    y = small.site(x, "w", 12)
    biased = small.call(torch.add, y, small.input("b", 12))
    adapted = small.call(torch.add, biased, small.lora(x, "w", 12))
    scaled = small.call(torch.mul, adapted, 2.0)
    rewrite = small.rewrite(scaled)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    assert completes_site(biased, values[y]) and completes_site(adapted, values[y])
    assert not completes_site(scaled, values[y])
