"""Does it pay? Tokens, FLOPs, times, what it costs before it pays, and a plain verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparselora_fx.compiler.report import Compilation
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.speed_check import Verdict
from sparselora_fx.runtime.step_cost import tallied_flops, traced_flops, verified_times
from sparselora_fx.runtime.tally import TokenTally
from sparselora_fx.runtime.tracing import Traced
from sparselora_fx.user.cost import bill
from sparselora_fx.user.linear_rows import LinearRow


def worth_of(
    runtime: Runtime,
    rows: Sequence[LinearRow],
    tally: TokenTally,
    compilations: Sequence[Compilation],
    traced: Traced | None,
) -> dict[str, Any]:
    """Figures by name, None where nobody knows; those that `cost` tells are its. ``traced``: the
    batch that was; None: what ran.

    ``sparse_tokens``: the share of tokens that were sparse, of those that are no padding;
    ``sliced``: the share of the frozen linears' weights that belongs to rewritten ones; ``graphs``;
    ``traced``: they were traced, and not run; ``dense_flops``, ``sparse_flops``: of a step, forward
    and backward, and ``choosing_flops``: those of the sparse one that choose channels;
    ``predicted_ratio``: how many times faster a sparse step is by what it has to do, and
    ``measured_ratio`` by the clock; ``dense_ms``, ``sparse_ms``: of steps, as `SpeedCheck` timed
    them; ``compile_seconds``, of sparse graphs; ``estimator_seconds``; ``break_even_step``: from it
    on training is ahead of a dense one; ``verdict``: one sentence.
    """
    flops = traced_flops(traced) if traced else tallied_flops(runtime)
    cost = bill(runtime, flops, verified_times(runtime))
    known = traced is not None
    times = cost.times
    found: dict[str, Any] = {
        "sparse_tokens": _sparse_tokens(tally),
        "sliced": _sliced(runtime, rows),
        "graphs": len(compilations),
        "traced": known,
        "dense_flops": flops.dense if known else None,
        "sparse_flops": flops.sparse if known else None,
        "choosing_flops": flops.predictor if known else None,
        "predicted_ratio": cost.predicted_ratio if known else None,
        "measured_ratio": cost.measured_ratio,
        "dense_ms": times and 1e3 * times.dense,
        "sparse_ms": times and 1e3 * times.sparse,
        "compile_seconds": cost.compile_seconds if runtime.compilations else None,
        "estimator_seconds": cost.estimator_seconds,
        "break_even_step": cost.break_even_steps,
    }
    total = runtime.step[1] if runtime.step else None
    if runtime.plan.too_short(total):
        verdict = f"No: with {total} steps training stays dense (the plan's min_steps)."
    else:
        verdict = _verdict(rows, found, runtime.speed.verdict, tally)
    found["verdict"] = f"Does it pay? {verdict}"
    return found


def _sparse_tokens(tally: TokenTally) -> float | None:
    if tally.calls:
        return tally.sparse / max(tally.real, 1)
    return 1.0 if tally.all_sparse else None


def _sliced(runtime: Runtime, rows: Sequence[LinearRow]) -> float:
    sizes = {w.name: w.out_features * w.in_features for w in runtime.frozen}
    return sum(sizes[row.name] for row in rows if row.sliced) / max(1, sum(sizes.values()))


def _verdict(
    rows: Sequence[LinearRow], found: dict[str, Any], measured: Verdict | None, tally: TokenTally
) -> str:
    if measured is not None and not measured.pays:
        return f"No: {measured}. Training stays dense."
    if measured is not None:
        even = found["break_even_step"]
        return f"Yes: {measured}" + (f"; paid for after {even} steps." if even is not None else ".")
    linears = [row for row in rows if row.linear]
    done = sum(row.sliced for row in linears)
    if tally.only_dense:
        return (
            "No: hardly a token is sparse, and such steps run dense (min_sparse). Set the labels "
            "of the prompt to -100, or let output tokens be sparse, too."
        )
    if not done:
        if any(row.waiting for row in linears):
            return "Not known before a training step: pass a batch to look ahead."
        return "No: nothing is sliced, so a step costs what torch.compile's does."
    ratio, sparse = found["predicted_ratio"], found["sparse_tokens"]
    if ratio is not None and ratio <= 1:
        return f"No: a sparse step would take {1 / ratio:.2f}x the time of a dense one."
    share = "an unknown share" if sparse is None else f"{sparse:.0%}"
    skips = f"{share} of the tokens skip channels of {done} of {len(linears)} frozen linears"
    if ratio is None:
        return f"Pass a batch to predict it; {skips}, and no step was timed."
    return f"Predicted {ratio:.2f}x, not measured yet: {skips}."


def worth_lines(worth: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people: a name and a text each."""
    tokens, ratio = worth["sparse_tokens"], worth["measured_ratio"]
    lines = [("tokens sparse", "not known yet" if tokens is None else f"{tokens:.1%}")]
    if worth["predicted_ratio"] is not None:
        parts = (worth[f"{kind}_flops"] for kind in ("dense", "sparse", "choosing"))
        dense, sparse, choosing = map(big, parts)
        text = f"{dense} dense, {sparse} sparse, of which {choosing} choose channels"
        lines += [("FLOPs of a step", text), ("predicted", f"{worth['predicted_ratio']:.2f}x")]
    else:
        lines.append(("predicted", "pass a batch to count FLOPs"))
    times = f"{worth['dense_ms'] or 0:.3g} ms dense, {worth['sparse_ms'] or 0:.3g} ms sparse"
    lines.append(("measured", "not measured yet" if ratio is None else f"{ratio:.2f}x: {times}"))
    compiling = worth["compile_seconds"]
    text = "not compiled yet" if compiling is None else f"{compiling:.1f} s"
    lines.append(("compile, estimator", f"{text}, {worth['estimator_seconds']:.1f} s"))
    even = worth["break_even_step"]
    unknown = "not known before steps are timed" if ratio is None else "not reached"
    lines.append(("break-even", unknown if even is None else f"after {even} steps"))
    return lines


def big(count: int) -> str:
    """``1.86e+13`` -> ``18.6 T``"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
