"""The picture of a file: scores with their intervals, loss curves, and score over FLOPs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import UNTRAINED
from benchmarks.evidence.equivalence import t_quantile
from benchmarks.evidence.results import Results

POINTS = 20  # of a loss curve; each is the mean of the steps up to the next


def plot(results: Results, path: Path) -> None:
    """A row of three panels for each task that something was trained on; arms keep their colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(run["task"] for run in results.runs if run["arm"] != UNTRAINED))
    arms = list(dict.fromkeys(run["arm"] for run in results.runs))
    colours = {arm: f"C{n % 10}" for n, arm in enumerate(arms)}
    figure, axes = pyplot.subplots(len(tasks), 3, figsize=(13, 3.4 * len(tasks)), squeeze=False)
    for (scores, curves, frontier), task in zip(axes, tasks, strict=True):
        runs = [run for run in results.runs if run["task"] == task]
        _scores(scores, runs, arms, colours)
        _curves(curves, results.curves, task, colours)
        _frontier(frontier, runs, colours)
        scores.set_title(f"{task}: score, 90 % interval over seeds", fontsize=9)
        curves.set_title("training loss, mean over seeds", fontsize=9)
        frontier.set_title("score over main-branch FLOPs", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=64)
    pyplot.close(figure)


def interval(scores: list[float]) -> tuple[float, float]:
    """Mean and half the 90 % interval of the mean; 0 for a single score."""
    if len(scores) < 2:
        return scores[0], 0.0
    half = t_quantile(0.95, len(scores) - 1) * statistics.stdev(scores) / len(scores) ** 0.5
    return statistics.fmean(scores), half


def _scores(axis: Any, runs: list[dict[str, Any]], arms: list[str], colours: Any) -> None:
    arms = [arm for arm in arms if any(run["arm"] == arm for run in runs)]
    for place, arm in enumerate(arms):
        found = [run["score"] for run in runs if run["arm"] == arm]
        mean, half = interval(found)
        axis.errorbar(mean, place, xerr=half, fmt="o", color=colours[arm], capsize=3)
        axis.plot(found, [place] * len(found), "|", color=colours[arm], alpha=0.5)
    axis.set_yticks(range(len(arms)), arms, fontsize=8)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)


def _curves(axis: Any, curves: dict[str, list[float]], task: str, colours: Any) -> None:
    for arm, colour in colours.items():
        mine = [c for name, c in curves.items() if name.rpartition("/")[0] == f"{task}/{arm}"]
        if mine:
            mean = [statistics.fmean(losses) for losses in zip(*mine, strict=True)]
            width = max(1, len(mean) // POINTS)
            steps = range(0, len(mean), width)
            points = [statistics.fmean(mean[i : i + width]) for i in steps]
            axis.plot(steps, points, color=colour, label=arm, linewidth=1)
    axis.set_yscale("log")
    axis.legend(fontsize=6)
    axis.grid(alpha=0.3)


def _frontier(axis: Any, runs: list[dict[str, Any]], colours: Any) -> None:
    for arm in dict.fromkeys(run["arm"] for run in runs if run["flops_share"] > 0):
        mine = [run for run in runs if run["arm"] == arm]
        mean, half = interval([run["score"] for run in mine])
        share = statistics.fmean(run["flops_share"] for run in mine)
        axis.errorbar(share, mean, yerr=half, fmt="o", color=colours[arm], capsize=3)
        axis.annotate(arm, (share, mean), fontsize=7)
    axis.grid(alpha=0.3)
