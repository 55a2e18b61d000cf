"""The file of a benchmark: every finished run at once, so that a stopped one goes on later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import DENSE, UNTRAINED
from benchmarks.evidence.equivalence import margin, paired_tost
from benchmarks.evidence.training import Settings

FACE = ("task", "arm", "seed", "lr", "score", "loss", "flops_share")


@dataclass
class Results:
    """``runs``: rows of `FACE`; ``tuning``: the validation loss of every learning rate tried;
    ``curves``: the loss of each step, by "task/arm/seed"."""

    path: Path
    settings: dict[str, Any]
    machine: dict[str, Any]
    runs: list[dict[str, Any]]
    tuning: list[dict[str, Any]]
    curves: dict[str, list[float]]
    seconds: float = 0.0

    def has(self, task: str, arm: str, seed: int) -> bool:
        """Whether a run is done."""
        return any((r["task"], r["arm"], r["seed"]) == (task, arm, seed) for r in self.runs)

    def tried(self, task: str, arm: str) -> dict[float, float]:
        """Learning rate -> validation loss, of those tried."""
        rows = (r for r in self.tuning if (r["task"], r["arm"]) == (task, arm))
        return {r["lr"]: r["loss"] for r in rows}

    def save(self) -> None:
        """Write all of it under another name, then put that in the file's place."""
        body = {
            "settings": self.settings, "machine": self.machine, "seconds": round(self.seconds, 1),
            "runs": self.runs, "tost": tost(self.runs), "tuning": self.tuning,
            "curves": self.curves,
        }  # fmt: skip
        beside = self.path.with_suffix(".partial")
        beside.write_text(_lines(body), encoding="utf-8")
        os.replace(beside, self.path)


def open_results(path: Path, settings: Settings | None, machine: dict[str, Any]) -> Results:
    """What a file holds, or nothing yet; ends the program if its runs had other settings.

    None: to look only, whatever the settings."""
    mine = json.loads(json.dumps(asdict(settings or Settings())))
    if not path.exists():
        return Results(path, mine, machine, [], [], {})
    body = json.loads(path.read_text(encoding="utf-8"))
    if settings is not None and body["settings"] != mine:
        raise SystemExit(
            f"{path} holds runs with {body['settings']}, these would have {mine}; use the same "
            "settings or another file"
        )
    return Results(path, **{name: value for name, value in body.items() if name != "tost"})


def tost(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against dense with the same seeds, in points of score."""
    rows = []
    for task, arm in sorted({(r["task"], r["arm"]) for r in runs}):
        if arm in (DENSE, UNTRAINED):
            continue
        mine, dense = (_by_seed(runs, task, name) for name in (arm, DENSE))
        seeds = sorted(mine.keys() & dense.keys())
        if len(seeds) < 2:
            continue
        found = paired_tost([mine[s] for s in seeds], [dense[s] for s in seeds], margin(len(seeds)))
        rows.append({"task": task, "arm": arm, "delta": found.delta, "n": found.n,
                     "low": round(found.low, 3), "high": round(found.high, 3),
                     "equivalent": found.equivalent})  # fmt: skip
    return rows


def _by_seed(runs: list[dict[str, Any]], task: str, arm: str) -> dict[int, float]:
    return {r["seed"]: r["score"] for r in runs if (r["task"], r["arm"]) == (task, arm)}


def _lines(body: dict[str, Any]) -> str:
    """JSON with one line for each row of a list or entry of a mapping."""
    parts = []
    for name, value in body.items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f' "{name}": [\n  {inner}\n ]' if value else f' "{name}": []')
        elif name == "curves":
            inner = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f' "{name}": {{\n  {inner}\n }}' if value else f' "{name}": {{}}')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def table(results: Results) -> str:
    """One line for each task and arm: means over seeds, and the verdict against dense."""
    verdicts = {(row["task"], row["arm"]): row for row in tost(results.runs)}
    lines = [f"{'task':<14}{'arm':<18}{'n':>3}{'lr':>9}{'score':>8}{'loss':>9}{'FLOPs':>8}"
             "   90 % interval of the score against dense"]  # fmt: skip
    for task, arm in dict.fromkeys((r["task"], r["arm"]) for r in results.runs):
        rows = [r for r in results.runs if (r["task"], r["arm"]) == (task, arm)]
        score, loss, flops = (
            sum(r[name] for r in rows) / len(rows) for name in ("score", "loss", "flops_share")
        )
        verdict = verdicts.get((task, arm))
        said = "" if verdict is None else (
            f"   {verdict['low']:+.2f} to {verdict['high']:+.2f}, "
            + ("equivalent" if verdict["equivalent"] else "not shown to be equivalent")
            + f" at {verdict['delta']} (n = {verdict['n']})"
        )  # fmt: skip
        rate = rows[-1]["lr"]
        lines.append(f"{task:<14}{arm:<18}{len(rows):>3}{'-' if rate is None else rate:>9}"
                     f"{score:>8.1f}{loss:>9.4f}{flops:>8.1%}{said}")  # fmt: skip
    return "\n".join(lines)
