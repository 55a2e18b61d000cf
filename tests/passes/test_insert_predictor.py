"""Before each region, its own function on factors chooses the channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.plan.score import Score
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support.small_graphs import (
    F64,
    Small,
    after,
    changes_nothing,
    fresh,
    keeps_values,
    shown,
    text,
    values_of,
)


def ffn(score: Score | None = None, *, counted: bool = False) -> Rewrite:
    small = Small()
    x = small.input("x", 2, 3, 8)
    tokens = (small.input("counted", 2, 3, dtype=torch.bool),) if counted else ()
    gate = small.call(F.silu, small.site(x, "gate", 16, tokens=tokens))
    h = small.call(torch.mul, gate, small.site(x, "up", 16, tokens=tokens))
    options = Options(channel_multiple=1, score=score or Score())
    rewrite = small.rewrite(small.site(h, "down", 8, tokens=tokens), options=options)
    after(rewrite, find_sites, find_regions)
    assert len(rewrite.regions) == 1
    return rewrite


def test_the_region_s_own_function_on_factors() -> None:
    rewrite = ffn()
    assert keeps_values(rewrite, insert_predictor) == 1
    assert text(rewrite) == shown("""
        v0 = detach(x)
        v1 = pool_tokens(v0, None)
        v2 = linear(v1, gate_fb)
        v3 = low_rank_linear(v2, gate_fa)
        v4 = silu(v3)
        v5 = linear(v1, up_fb)
        v6 = low_rank_linear(v5, up_fa)
        v7 = mul(v4, v6)
        v8 = channel_energy(v7, None, None, False)
        v9 = topk_channels(v8, 8)
        v10 = linear(x, gate, None)
        v11 = silu(v10)
        v12 = linear(x, up, None)
        v13 = mul(v11, v12)
        v14 = linear(v13, down, None)
        return (v14)
    """)
    changes_nothing(fresh(rewrite), insert_predictor)


def test_it_chooses_by_the_paper_s_formula() -> None:
    """Recomputed here: the mean token of each sample, through factors and function, squared."""
    rewrite = ffn()
    after(rewrite, insert_predictor)
    (region,) = rewrite.regions
    selection = region.choices[0].selection
    rewrite.graph.output_node().args = ((selection,),)
    shapes = [("x", 2, 3, 8), ("gate_fa", 16, 2), ("gate_fb", 2, 8), ("up_fa", 16, 2),
              ("up_fb", 2, 8)]  # fmt: skip
    given = {name: torch.randn(*shape, dtype=F64) for name, *shape in shapes}
    pooled = given["x"].mean(dim=1)
    gate, up = (pooled @ given[f"{n}_fb"].T @ given[f"{n}_fa"].T for n in ("gate", "up"))
    energy = (F.silu(gate) * up).square().mean(dim=0)
    (got,) = values_of(rewrite, **given)
    assert got.tolist() == sorted(energy.topk(8).indices.tolist())


def test_of_two_consumers_both_weigh() -> None:
    """As if they were one linear with all of their outputs."""
    small = Small()
    h = small.call(F.silu, small.site(small.input("x", 2, 3, 8), "up", 16))
    score = Score(weighted=True)
    options = Options(channel_multiple=1, score=score)
    rewrite = small.rewrite(small.site(h, "down", 8), small.site(h, "more", 4), options=options)
    after(rewrite, find_sites, find_regions)
    (region,) = rewrite.regions
    for site in region.consumers:
        site.statistics["norms"] = small.input(f"{site.weight.name}_norms", 16)
    after(rewrite, insert_predictor)
    rewrite.graph.output_node().args = ((region.choices[0].selection,),)
    given = {"x": torch.randn(2, 3, 8, dtype=F64), "up_fa": torch.randn(16, 2, dtype=F64),
             "up_fb": torch.randn(2, 8, dtype=F64)}  # fmt: skip
    norms = {f"{name}_norms": torch.rand(16, dtype=F64) for name in ("down", "more")}
    hidden = F.silu(given["x"].mean(dim=1) @ given["up_fb"].T @ given["up_fa"].T)
    energy = hidden.square().mean(0) * sum(n.square() for n in norms.values())
    (got,) = values_of(rewrite, **given, **norms)
    assert got.tolist() == sorted(energy.topk(8).indices.tolist())


def test_only_counted_tokens_are_looked_at() -> None:
    rewrite = ffn(counted=True)
    after(rewrite, insert_predictor)
    assert "pool_tokens(v0, counted)" in text(rewrite)


@pytest.mark.parametrize("score", [Score("tokens"), Score("strided", 4)])
def test_other_scores_look_at_other_tokens(score: Score) -> None:
    rewrite = ffn(score)
    assert keeps_values(rewrite, insert_predictor) == 1
    assert "pool_tokens" not in text(rewrite)
    assert ("sample_tokens(v0, None, 4)" in text(rewrite)) == (score.context == "strided")


def test_inputs_that_come_too_late_are_a_reason() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    up = small.call(F.silu, small.site(x, "up", 16))
    scale = small.call(torch.sigmoid, small.call("mean", x, -1, keepdim=True))
    h = small.call(torch.mul, up, scale)
    rewrite = small.rewrite(small.site(h, "down", 8))
    after(rewrite, find_sites, find_regions)
    changes_nothing(rewrite, insert_predictor)
    assert not rewrite.regions
    assert {skip.reason for skip in rewrite.skips} == {
        "an input of the region is computed after its first producer"
    }
