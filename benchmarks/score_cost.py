"""What a score costs: its time for one SwiGLU region, beside the paper's pooled score.

The score's nodes are cut from the rewritten graph, compiled by Inductor by themselves, and run on
random values: time depends on shapes alone. Scores take turns, in a new order each turn as one
leaves its memory and caches to the next; a ratio is the median over turns, of processor time.
"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

import sparselora_fx as slx
from benchmarks.support.activations import FeedForward, Seen
from benchmarks.support.measuring import now
from benchmarks.support.quality import ScoreGraph
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.estimator.statistics import Statistics
from sparselora_fx.plan.score import parse_score

SHAPES = {"large": (8, 512, 2048, 8192), "tiny": (2, 16, 32, 96)}  # samples, length, K, N
RANK = 8
BASE = ("svd", "pooled")
VARIANTS = (
    BASE,
    ("svd", "tokens"),
    ("svd", "strided"),
    ("svd", "strided+weighted"),
    ("calibrated", "prior+weighted"),
    ("calibrated", "strided"),
    ("calibrated", "strided+prior"),
    ("calibrated", "strided+prior+weighted"),
    ("calibrated", "strided+prior+weighted+normalised"),
)


@torch.no_grad()
def measure(shape: str, turns: int = 15) -> dict[str, Any]:
    """Median milliseconds and median ratio to the pooled score of plain factors."""
    samples, length, width, channels = SHAPES[shape]
    region, estimators = _random(width, channels)
    seen = Seen(torch.randn(samples, length, width), torch.empty(0),
                torch.rand(samples, length) < 0.75)  # fmt: skip
    runs = {}
    for name, score in VARIANTS:
        graph = ScoreGraph(region, estimators[name], parse_score(score))
        run, inputs = torch.compile(graph.run), graph.arguments(estimators[name], region, seen)
        runs[name, score] = partial(run, *inputs)
        for _ in range(2):
            runs[name, score]()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    shuffle = random.Random(0)
    for _ in range(turns):
        for key in shuffle.sample(list(runs), len(runs)):
            start = now("cpu")
            runs[key]()
            times[key].append(now("cpu") - start)
    rows = [
        {
            "estimator": name, "score": score,
            "ms": round(1e3 * statistics.median(took), 3),
            "over_pooled": round(statistics.median(
                t / base for t, base in zip(took, times[BASE], strict=True)), 3),
        }
        for (name, score), took in times.items()
    ]  # fmt: skip
    sizes = {"tokens": samples * length, "inputs": width, "channels": channels, "rank": RANK}
    return {"shape": sizes, "turns": turns, "rows": rows}


def _random(inputs: int, channels: int) -> tuple[FeedForward, dict[str, slx.SVDEstimator]]:
    """A region and estimators of its shapes, plain and calibrated."""

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    producers = {name: (weight(channels, inputs), None) for name in ("gate", "up")}
    region = FeedForward("ffn", {**producers}, lambda gate, up: silu(gate) * up,
                         weight(inputs, channels), "down")  # fmt: skip
    sizes = {"gate": (channels, inputs), "up": (channels, inputs), "down": (inputs, channels)}
    factors = {name: Factors(torch.randn(n, RANK), torch.randn(RANK, k))
               for name, (n, k) in sizes.items()}  # fmt: skip
    known = {name: Statistics(torch.randn(n), *(torch.rand(size) for size in (n, k, k, k)))
             for name, (n, k) in sizes.items()}  # fmt: skip
    return region, {
        "svd": slx.SVDEstimator(factors, {}),
        "calibrated": slx.SVDEstimator(factors, {}, statistics=known),
    }
