"""The picture of `benchmarks.estimator_quality`: output error over sparsity at one
rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RANK = 8
LINES = {
    ("random", None): ("random channels", "#888888", ":"),
    ("svd", "pooled"): ("plain SVD, pooled (the paper's)", "#c23b22", "-"),
    ("svd", "strided+weighted"): ("plain SVD, default score", "#e8923a", "-"),
    ("calibrated", "strided"): ("calibrated factors alone", "#5a8fd0", "--"),
    ("static", "prior+weighted"): ("static: the prior alone, weighted", "#3a9d5d", "--"),
    ("calibrated", "strided+prior+weighted"): ("calibrated, default score", "#1f3d7a", "-"),
    ("oracle", None): ("best channels", "#000000", ":"),
}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel per model and error, of feed-forward regions; lines as in `LINES`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["region"] == "ffn"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(models), figsize=(4.4 * len(models), 6), sharex=True, squeeze=False
    )
    for column, model in enumerate(models):
        for line, key in enumerate(("error", "token_error")):
            axis = axes[line][column]
            for (estimator, score), (label, color, style) in LINES.items():
                found = {
                    row["s"]: row[key]
                    for row in rows
                    if row["model"] == model and row["rank"] in (RANK, None)
                    and (row["estimator"], row["score"]) == (estimator, score)
                }  # fmt: skip
                places = [str(s) for s in found]
                axis.plot(places, list(found.values()), style, color=color, label=label, marker=".")
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
            axis.set_title(model if line == 0 else "")
        axes[1][column].set_xlabel("sparsity s")
    axes[0][0].set_ylabel("error, all tokens")
    axes[1][0].set_ylabel("error per token, mean")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        f"Output error of feed-forward regions, held-out text, rank {RANK}", fontsize=10
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=64)
    pyplot.close(figure)
