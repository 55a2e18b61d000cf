"""`report`: one HTML file that shows what a sparse step does. It loads nothing from elsewhere."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from torch import nn

from sparselora_fx.compiler.report import Compilation
from sparselora_fx.errors import CompileError
from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.runtime.tracing import Traced, trace
from sparselora_fx.user.drift import drift
from sparselora_fx.user.explain import explain_trace
from sparselora_fx.user.explanation import Explanation
from sparselora_fx.user.folding import PlanKeys
from sparselora_fx.user.linear_rows import LinearRow
from sparselora_fx.user.record import Recording
from sparselora_fx.user.report_charts import bars, curve
from sparselora_fx.user.report_drawing import drawing_of
from sparselora_fx.user.report_history import probe_rows, stability
from sparselora_fx.user.worth import big, worth_lines

_DIFF_LINES = 400  # of one pass; a deep model's are alike


def report(
    model: nn.Module,
    batch: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    recordings: Sequence[Recording] = (),
) -> Path:
    """Write what a sparse step on a batch would do as one HTML file; the step is traced, not run.

    Verdict, FLOPs and times, a map of the layers, a region before and after, all linears with a
    search, and what each pass changed; of a watched model, its drift. With ``recordings``, how
    stable choices are over steps, and how much they depend on the input.

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, as in training.
        path: file to write.
        recordings: of `record`, each of one step, in their order.

    Returns:
        The path.

    Raises:
        CompileError: the model is not compiled, matplotlib is not installed, or the file cannot be
            written.
    """
    runtime = get_runtime(model)
    traced = trace(runtime, batch, texts=True)
    return write_report(explain_trace(runtime, traced), traced, path, recordings)


def write_report(
    said: Explanation,
    traced: Traced,
    path: str | os.PathLike[str],
    recordings: Sequence[Recording] = (),
) -> Path:
    """The same of a batch that was traced with its texts, and what is said of it."""
    from jinja2 import Environment

    model = traced.runtime.model
    source = Path(__file__).with_name("templates") / "report.html.jinja"
    template = Environment(autoescape=True).from_string(source.read_text(encoding="utf-8"))
    base = getattr(model, "get_base_model", lambda: model)()
    keys = PlanKeys(row.name for row in said.rows)
    page = template.render(
        title=f"{type(base).__name__}, {sum(r.sliced for r in said.rows)} linears sliced",
        verdict=said.worth["verdict"],
        facts=_facts(said, traced.compilations),
        strips=_strips(said.rows, keys),
        charts=_charts(said),
        measured=said.worth["measured_ratio"] is not None,
        drawing=drawing_of(said.rows, keys),
        stability=stability(recordings, said.rows, keys),
        drift=_drift(traced.runtime, keys),
        rows=[_shown(row, keys) for row in said.rows],
        graphs=[_graph(one) for one in traced.compilations if one.log.records],
    )
    target = Path(path)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CompileError(f"cannot write the report to {str(path)!r}: {error}") from error
    return target


def _facts(said: Explanation, compilations: Sequence[Compilation]) -> list[tuple[str, str]]:
    sizes = {one.batch for one in compilations if one.batch}
    why = [
        (f"dense: {', '.join(group.names)}", f"{group.count} linears. {group.note}")
        for group in said.dense
    ]
    known = [("batch", ", ".join(sorted(sizes)) or "-"), ("graphs", str(len(compilations)))]
    return [*known, *worth_lines(said.worth), *why]


def _charts(said: Explanation) -> list[tuple[str, Markup]]:
    """Shares, FLOPs and times, as far as they are known."""
    worth, found = said.worth, []
    names = {"sparse_tokens": "sparse tokens", "sliced": "sliced weights"}
    shares = [(text, worth[key]) for key, text in names.items() if worth[key] is not None]
    if shares:
        rows = [(text, value, f"{value:.0%}") for text, value in shares]
        found.append(("Shares", bars("shares", rows)))
    if worth["predicted_ratio"] is not None:
        kinds = {"dense": "dense", "sparse": "sparse", "choosing": "the choice"}
        values = [(text, worth[f"{kind}_flops"]) for kind, text in kinds.items()]
        rows = [(text, value, big(value)) for text, value in values]
        title = f"FLOPs of a step: {worth['dense_flops'] / worth['sparse_flops']:.2f}x fewer"
        found.append((title, bars("FLOPs of a step", rows)))
    if worth["measured_ratio"] is not None:
        rows = [(k, worth[f"{k}_ms"], f"{worth[f'{k}_ms']:.3g} ms") for k in ("dense", "sparse")]
        title = f"Time of a step: measured {worth['measured_ratio']:.2f}x"
        found.append((title, bars("time of a step", rows)))
    return found


def _drift(runtime: Runtime, keys: PlanKeys) -> dict[str, object] | None:
    """The history of a watched model; None: nobody watches."""
    if runtime.watching is None:
        return None
    probes = drift(runtime.model).to_json()["probes"]
    points = [(p["step"], p["loss_gap"]) for p in probes if p["loss_gap"] is not None]
    names = ("optimizer step", "loss gap, nats per token")
    chart = curve("loss gap over steps", points, names) if len(points) > 1 else ""
    return {"chart": chart, "rows": probe_rows(probes, keys)}


def _strips(rows: Sequence[LinearRow], keys: PlanKeys) -> list[tuple[str, list[dict[str, object]]]]:
    """By kind of region, a cell for each."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for row in rows:
        if row.sliced:
            key = keys.key(row.region or row.name)
            numbers = re.findall(r"\.(\d+)(?=\.|$)", f".{key}")
            cell = {
                "key": key, "label": ".".join(numbers) or key, "kept": row.kept,
                "percent": skipped_percent(row.kept),
            }  # fmt: skip
            found.setdefault(row.kind, {}).setdefault(key, cell)
    return [(kind, list(cells.values())) for kind, cells in found.items()]


def skipped_percent(kept: str) -> int:
    """``"32 of 128, 64 of 128"`` -> the percentage of all those channels that is skipped."""
    pairs = [(int(k), int(n)) for k, n in re.findall(r"(\d+) of (\d+)", kept)]
    total = sum(n for _, n in pairs)
    return round(100 * (1 - sum(k for k, _ in pairs) / total)) if total else 0


def _shown(row: LinearRow, keys: PlanKeys) -> dict[str, str]:
    region = f"{keys.key(row.region or row.name)} ({row.kind})" if row.sliced else "-"
    return {
        "key": keys.key(row.name), "shape": row.shape, "region": region, "kept": row.kept or "-",
        "status": row.status,
    }  # fmt: skip


def _graph(one: Compilation) -> dict[str, object]:
    """The passes of a graph that changed it, each with a diff."""
    texts, steps = dict(one.log.start), []
    for record in one.log.records:
        if not record.text:
            continue
        before, texts[record.part] = texts[record.part], record.text
        lines = list(
            difflib.unified_diff(
                before.splitlines(), record.text.splitlines(), "before", "after", "", "", 1, ""
            )
        )
        left = len(lines) - _DIFF_LINES
        more = [f"... and {left} more lines"] if left > 0 else []
        name = f"{record.name} in {record.part}" if record.part else record.name
        words = f"{record.changes} changes; {record.difference or 'no op came or went'}"
        diff = "\n".join([*lines[:_DIFF_LINES], *more])
        steps.append({"name": f"{record.number}. {name}", "words": words, "diff": diff})
    return {"title": f"Graph {one.number} ({one.kind}), {one.nodes} calls", "steps": steps}
