"""The rows of `benchmarks.estimator_quality`: what they are of, and how they are made."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import sparselora_fx as slx
from benchmarks.support.activations import Batch, FeedForward, Seen
from benchmarks.support.attention_quality import Cases, exact, of_attentions
from benchmarks.support.quality import Judged, ScoreGraph, judge, true_scores
from benchmarks.support.random_factors import noise
from sparselora_fx.analysis.regions import kept_channels
from sparselora_fx.plan.score import parse_score

SPARSITIES = (0.5, 0.75, 0.9, 0.97, 0.99)
SCORES = {
    "svd": (
        "pooled", "pooled+weighted", "tokens", "tokens+weighted", "tokens+weighted+normalised",
        "strided", "strided+weighted",
    ),
    "calibrated": (
        "pooled", "pooled+prior+weighted", "tokens", "tokens+prior", "tokens+weighted",
        "tokens+prior+weighted", "tokens+prior+weighted+normalised", "strided", "strided+prior",
        "strided+weighted", "strided+prior+weighted", "strided+prior+weighted+normalised",
    ),
    "static": ("prior", "prior+weighted", "prior+weighted+normalised"),
    "exact": ("strided+weighted",),
}  # fmt: skip
ATTENTION_SCORES = {
    "svd": ("pooled", "strided+weighted"),
    "calibrated": ("pooled", "strided+weighted", "strided+prior+weighted"),
    "exact": ("strided+weighted",),
}
UNRANKED = ("static", "exact")
DRAWS = 4  # of random channels, per region and batch
GAP_RANK, GAP_SPARSITIES = 8, (0.5, 0.75, 0.9, 0.97)
KEYS = ("model", "region", "estimator", "score", "s", "rank", "overlap", "error", "token_error",
        "loss")  # fmt: skip
SAME = ("model", "region", "estimator", "score", "s")  # what a share of the gap is of
Row = dict[str, Any]
Scorer = Callable[[FeedForward, Seen], Tensor]


def row_of(face: tuple[Any, ...], judged: Sequence[Judged]) -> Row:
    """What ``face`` names (keys up to the rank), with the means of judgements."""
    values = (round(statistics.mean(each), 4) for each in zip(*judged, strict=True))
    return dict(zip(KEYS, (*face, *values, None), strict=True))


class Rows:
    """The rows of one model, from the activations of its regions on test text."""

    def __init__(self, model: str, regions: list[FeedForward], seen: dict[str, list[Seen]]) -> None:
        self.model = model
        self.cases = [(region, each) for region in regions for each in seen[region.name]]
        self.truth = [true_scores(*case) for case in self.cases]
        self.rows: list[Row] = []

    def add(self, estimator: str, score: str | None, rank: int | None, scorer: Scorer) -> None:
        """One row per sparsity: the means over regions and batches."""
        found = []
        for (region, seen), truth in zip(self.cases, self.truth, strict=True):
            kept = [kept_channels(len(truth), s, 1) for s in SPARSITIES]
            found.append(judge(scorer(region, seen), region, seen, kept, truth))
        for s, judged in zip(SPARSITIES, zip(*found, strict=True), strict=True):
            self.rows.append(row_of((self.model, "ffn", estimator, score, s, rank), judged))

    def add_references(self, seed: int) -> None:
        """Random channels and the best ones."""
        generator = torch.Generator().manual_seed(seed)
        drawn = Rows(self.model, [], {})
        drawn.cases, drawn.truth = self.cases * DRAWS, self.truth * DRAWS
        drawn.add("random", None, None, lambda region, _: torch.rand(
            region.consumer.shape[1], generator=generator))  # fmt: skip
        self.rows += drawn.rows
        self.add("oracle", None, None, true_scores)

    def add_scores(
        self, estimators: dict[str, slx.SVDEstimator], rank: int, graphs: dict[Any, ScoreGraph]
    ) -> None:
        """Every score of each given estimator; the prior alone counts for no rank."""
        for name, estimator in estimators.items():
            for score in SCORES[name]:
                if (name, score) not in graphs:
                    first = self.cases[0][0]
                    graphs[name, score] = ScoreGraph(first, estimator, parse_score(score))
                scorer = partial(graphs[name, score], estimator)
                self.add(name, score, None if name in UNRANKED else rank, scorer)


def attention_rows(
    name: str, llama: Any, tests: list[Batch], estimators: dict[str, slx.SVDEstimator]
) -> list[Row]:
    """All rows of the attentions of a Llama, with estimators of rank 8."""
    cases = Cases.of(llama, tests)
    known = {kind: of_attentions(each) for kind, each in estimators.items()}
    known["exact"] = exact(known["svd"], {
        weight: llama.get_parameter(f"{weight}.weight") for weight in known["svd"].factors
    })  # fmt: skip
    found = []
    for s in tqdm(SPARSITIES, desc=f"{name}, attentions"):
        best = cases.find_best(known["exact"], s)
        found.append(row_of((name, "attention", "oracle", None, s, None), best))
        drawn = (noise(known["svd"], seed) for seed in range(DRAWS))
        judged = [one for each in drawn for one in cases.judge(each, "pooled", s)]
        found.append(row_of((name, "attention", "random", None, s, None), judged))
        for kind, scores in ATTENTION_SCORES.items():
            rank = None if kind in UNRANKED else GAP_RANK
            for score in scores:
                judged = cases.judge(known[kind], score, s)
                found.append(row_of((name, "attention", kind, score, s, rank), judged))
    return found


def gaps(rows: list[Row]) -> list[Row]:
    """Share of the way from random to oracle, in either error, for rank 8 and the prior alone."""
    ends = {
        (r["model"], r["region"], r["estimator"], r["s"]): r for r in rows if r["score"] is None
    }
    found = []
    for row in rows:
        if row["rank"] not in (GAP_RANK, None) or row["s"] not in GAP_SPARSITIES:
            continue
        if row["score"] is None:
            continue
        low, high = (
            ends[row["model"], row["region"], name, row["s"]] for name in ("oracle", "random")
        )
        shares = {
            key: round((high[key] - row[key]) / (high[key] - low[key]), 3)
            for key in ("error", "token_error")
        }
        found.append({key: row[key] for key in SAME} | shares)
    return found
