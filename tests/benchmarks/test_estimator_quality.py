"""The estimator benchmark measures what it says: the library's own scores, true errors."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import sparselora_fx as slx
from benchmarks import estimator_quality, quality_loss, score_cost
from benchmarks.support import quality_plot, quality_rows
from benchmarks.support.activations import FeedForward, Seen
from benchmarks.support.quality import Ffn, ScoreGraph, judge
from sparselora_fx.plan.score import parse_score

K, N, M = 16, 48, 64
NAMES = ("producers.0", "producers.1")


def region(seed: int = 0, *, bias: bool = False) -> FeedForward:
    """A SwiGLU region whose consumer has orthogonal columns of different norms."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    producers = {name: (values(N, K), values(N) if bias else None) for name in NAMES}
    columns = torch.linalg.qr(values(M, N)).Q * (0.2 + torch.rand(N, generator=generator))
    return FeedForward("ffn", producers, lambda a, b: silu(a) * b, columns, "consumer")


def seen_by(known: FeedForward, x: Tensor) -> Seen:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    (wa, ba), (wb, bb) = known.producers.values()
    rows = x.flatten(0, 1)
    hidden = known.combine(*(torch.nn.functional.linear(rows, w, b)
                             for w, b in ((wa, ba), (wb, bb))))  # fmt: skip
    return Seen(x, hidden, mask)


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, K, generator=generator) * torch.rand(4, 9, 1, generator=generator)


def built(known: FeedForward, rank: int, *, calibrated: bool) -> slx.SVDEstimator:
    data = [{"x": inputs(seed)} for seed in (50, 51)] if calibrated else None
    return slx.SVDEstimator.build(Ffn(known), rank, calibration=data, progress=False)


def selected(known: FeedForward, estimator: slx.SVDEstimator, score: str, x: Tensor) -> list[int]:
    """What the compiled module really keeps."""
    module = Ffn(known)
    plan = slx.SparsityPlan(0.75, tokens="all", start_step=0, channel_multiple=1, score=score)
    slx.compile(module, estimator, plan=plan, backend="eager")
    with slx.record(module) as record:
        module(x)
    (choices,) = record.selections.values()
    return choices["ffn"].tolist()


@pytest.mark.parametrize(
    ("score", "calibrated"),
    [
        ("pooled", False), ("tokens+weighted+normalised", False), ("strided", True),
        ("prior+weighted", True), ("strided+prior+weighted", True),
    ],
)  # fmt: skip
def test_scores_are_those_of_the_compiled_region(score: str, calibrated: bool) -> None:
    """Also for another region and another rank than the graph was traced with."""
    first, other = region(0, bias=True), region(1, bias=True)
    graph = ScoreGraph(first, built(first, 4, calibrated=calibrated), parse_score(score))
    for known, rank, x in ((first, 4, inputs(7)), (other, 6, inputs(8))):
        estimator = built(known, rank, calibrated=calibrated)
        scores = graph(estimator, known, seen_by(known, x))
        kept = scores.topk(N // 4).indices.sort().values.tolist()
        assert kept == selected(known, estimator, score, x)


def test_errors_are_those_of_the_masked_output() -> None:
    known = region()
    seen = seen_by(known, inputs(3))
    scores = torch.rand(N, generator=torch.Generator().manual_seed(5))
    kept = (24, 3, N)
    whole = seen.hidden @ known.consumer.t()
    for k, judged in zip(kept, judge(scores, known, seen, kept, scores), strict=True):
        mask = torch.zeros(N).index_fill_(0, scores.topk(k).indices, 1.0)
        lost = whole - (seen.hidden * mask) @ known.consumer.t()
        assert judged.overlap == 1
        assert judged.error == pytest.approx(float(lost.norm() / whole.norm()), abs=1e-5)
        each = lost.norm(dim=1) / whole.norm(dim=1)
        assert judged.token_error == pytest.approx(float(each.mean()), abs=1e-5)


FEW = {
    "svd": ("pooled", "tokens", "strided+weighted"),
    "calibrated": ("strided+prior+weighted", "strided+prior+weighted+normalised"),
    "static": ("prior", "prior+weighted"),
}


@pytest.fixture(scope="module")
def rows() -> list[quality_rows.Row]:
    known = region()
    seen = {"ffn": [seen_by(known, inputs(seed)) for seed in range(6)]}
    table = quality_rows.Rows("demo_model", [known], seen)
    table.add_references(seed=0)
    aware = built(known, 8, calibrated=True)
    estimators = {"svd": built(known, 8, calibrated=False), "calibrated": aware, "static": aware}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_rows, "SCORES", FEW)  # each takes a trace
        table.add_scores(estimators, 8, {})
    return table.rows


def test_all_scores_can_be_read() -> None:
    for words in quality_rows.SCORES.values():
        assert len({parse_score(word) for word in words}) == len(words)
    for name, words in FEW.items():
        assert set(words) <= set(quality_rows.SCORES[name])


def test_rows_hold_every_score_and_sparsity(rows: list[quality_rows.Row]) -> None:
    scores = sum(len(words) for words in FEW.values())
    assert len(rows) == (scores + 2) * len(quality_rows.SPARSITIES)
    for row in rows:
        assert tuple(row) == quality_rows.KEYS
        ranked = row["estimator"] in ("svd", "calibrated")
        assert row["rank"] == (8 if ranked else None)
        assert (row["score"] is None) == (row["estimator"] in ("random", "oracle"))
        assert 0 <= row["overlap"] <= 1 and row["error"] > 0 and row["loss"] is None


def test_the_oracle_is_best_and_chance_is_chance(rows: list[quality_rows.Row]) -> None:
    """With orthogonal columns, errors add up channel by channel: no choice beats the oracle's."""
    for s in quality_rows.SPARSITIES:
        named = {row["estimator"]: row for row in rows if row["s"] == s and row["score"] is None}
        assert named["oracle"]["overlap"] == 1
        assert all(named["oracle"]["error"] <= row["error"] for row in rows if row["s"] == s)
    half = next(row for row in rows if row["estimator"] == "random" and row["s"] == 0.5)
    assert half["overlap"] == pytest.approx(0.5, abs=0.08)  # 24 draws of 24 of 48: sd 0.015


def test_gaps_are_shares_of_the_way(rows: list[quality_rows.Row]) -> None:
    found = quality_rows.gaps(rows)
    assert {row["s"] for row in found} == set(quality_rows.GAP_SPARSITIES)
    ends = {row["estimator"]: row["error"] for row in rows if row["s"] == 0.9}
    (gap,) = [row for row in found if row["score"] == "prior+weighted" and row["s"] == 0.9]
    (row,) = [row for row in rows if row["score"] == "prior+weighted" and row["s"] == 0.9]
    expected = (ends["random"] - row["error"]) / (ends["random"] - ends["oracle"])
    assert gap["error"] == pytest.approx(expected, abs=1e-3) and gap["error"] <= 1


def test_the_plot_draws_what_was_measured(
    rows: list[quality_rows.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {(name, word) for name, words in quality_rows.SCORES.items() for word in words}
    assert set(quality_plot.LINES) <= known | {("random", None), ("oracle", None)}
    few = {key: line for key, line in quality_plot.LINES.items() if key[1] != "strided"}
    monkeypatch.setattr(quality_plot, "LINES", few)  # the rows here lack that score
    quality_plot.plot(rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------ losses


def settings(**changes: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality_loss.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args([])) | changes))


def finished(path: Path, args: argparse.Namespace) -> None:
    kept = {name: getattr(args, name) for name in quality_loss.SETTINGS} | {"rank": 8}
    each = [asdict(run) | {"loss": 0.5 + run.seed} for run in quality_loss.runs(args.seeds)]
    path.write_text(json.dumps({"settings": kept, "runs": each, "seconds": 1.0}))


def test_runs_that_are_done_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, args = tmp_path / "f.json", settings(seeds=2)
    finished(path, args)
    monkeypatch.setattr(quality_loss, "train", None)  # calling it would raise
    results = quality_loss.complete(path, args)
    dense = quality_loss.means(results)["dense", None, None, None]
    assert dense == [0.5, 1.5]
    with pytest.raises(SystemExit, match="delete it"):
        quality_loss.complete(path, settings(seeds=2, steps=7))


def test_losses_go_to_their_rows(tmp_path: Path, rows: list[quality_rows.Row]) -> None:
    path = tmp_path / "f.json"
    finished(path, settings())
    table = [dict(row) for row in rows]
    estimator_quality.add_losses(table, json.loads(path.read_text()))
    entered = {(r["estimator"], r["score"], r["s"]) for r in table if r["loss"] is not None}
    wanted = {(r.estimator, r.score, r.s) for r in quality_loss.runs(1) if r.tokens == "context"}
    assert entered == {key for key in wanted if key[0] in ("svd", "calibrated", "static", "random")}
    assert all(row["loss"] in (None, 1.5) for row in table)


def test_noise_knows_nothing_of_the_weights() -> None:
    estimator = built(region(), 4, calibrated=False)
    one, two = (quality_loss.noise(estimator, seed) for seed in (0, 1))
    for name, factors in estimator.factors.items():
        drawn = one.factors[name]
        assert (drawn.a.shape, drawn.b.shape) == (factors.a.shape, factors.b.shape)
        likeness = torch.nn.functional.cosine_similarity(drawn.a.flatten(), factors.a.flatten(), 0)
        assert abs(float(likeness)) < 0.4 and not torch.equal(drawn.a, two.factors[name].a)


@pytest.mark.slow
def test_costs_are_timed_against_pooled() -> None:
    rows = score_cost.measure("tiny", turns=3)["rows"]
    assert [(row["estimator"], row["score"]) for row in rows] == list(score_cost.VARIANTS)
    assert rows[0]["over_pooled"] == 1 and all(row["ms"] > 0 for row in rows)
