"""Predictors' narrow matmuls on the same tokens are one, and what they choose stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparselora_fx as slx
from sparselora_fx.compiler import backend
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.passes.join_factors import join_factors
from sparselora_fx.plan.score import Score
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support import oracle
from tests.support.rewritten_graphs import rewritten
from tests.support.small_graphs import Small, after, changes_nothing, keeps_values, shown, text
from tests.support.token_batches import ragged


def predicted(gated: bool = True) -> Rewrite:
    """``down(silu(gate(x)) * up(x))`` with its predictor, ready for the pass; or without up."""
    small = Small()
    x = small.input("x", 2, 3, 8, trains=True)
    h = small.call(F.silu, small.site(x, "gate", 16))
    if gated:
        h = small.call(torch.mul, h, small.site(x, "up", 16))
    options = Options(channel_multiple=1, score=Score())
    rewrite = small.rewrite(small.site(h, "down", 8), options=options)
    after(rewrite, find_sites, find_regions, insert_predictor)
    assert len(rewrite.regions) == 1
    return rewrite


def test_factors_on_the_same_rows_are_one_matmul() -> None:
    rewrite = predicted()
    (choice,) = rewrite.regions[0].choices
    rewrite.graph.output_node().args = ((choice.selection,),)
    assert keeps_values(rewrite, join_factors) == 2
    assert "v2 = cat([gate_fb, up_fb])" in text(rewrite)
    assert "v4 = narrow(v3, -1, 0, 2)" in text(rewrite), shown(text(rewrite))
    changes_nothing(rewrite, join_factors)


def test_one_alone_stays() -> None:
    changes_nothing(predicted(gated=False), join_factors)


def test_attention_s_choices_share_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the three projections see is built once, so that their factors are one matmul."""
    model = oracle.llama(layers=1, dtype=torch.float64)
    plan = slx.SparsityPlan({"self_attn": 0.5}, start_step=0, channel_multiple=1)
    _, report = rewritten(monkeypatch, model, ragged(), plan)
    assert report.counts["join_factors"] == 3


def test_joined_or_not_the_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.llama(layers=2, dtype=torch.float64)
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    joint = oracle.run_compiled(model, ragged(), plan)
    without = tuple(p for p in backend.PIPELINE if p is not join_factors)
    assert len(without) == len(backend.PIPELINE) - 1
    monkeypatch.setattr(backend, "PIPELINE", without)
    oracle.assert_close(joint, oracle.run_compiled(model, ragged(), plan), 2e-6)
