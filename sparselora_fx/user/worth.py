"""Does it pay? Tokens, FLOPs, times, what it costs before it pays, and a plain verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparselora_fx.compiler.report import SPARSE, Compilation
from sparselora_fx.compiler.tracer import TracedFlops
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.speed_check import Verdict
from sparselora_fx.runtime.tally import TokenTally
from sparselora_fx.user.linear_rows import LinearRow


def worth_of(
    runtime: Runtime,
    rows: Sequence[LinearRow],
    tally: TokenTally,
    compilations: Sequence[Compilation],
    flops: TracedFlops | None,
) -> dict[str, Any]:
    """Figures by name, None where nobody knows. ``flops``: of a traced batch.

    ``sparse_tokens``: the share of tokens that were sparse, of those that are no padding;
    ``sliced``: the share of the frozen linears' weights that belongs to rewritten ones; ``graphs``;
    ``traced``: they were traced, and not run; ``dense_flops``, ``sparse_flops``: of a step, forward
    and backward, and ``choosing_flops``: those of the sparse one that choose channels;
    ``predicted_ratio``: dense over sparse FLOPs; ``measured_ratio``, ``dense_ms``, ``sparse_ms``:
    of steps, as `SpeedCheck` timed them; ``compile_seconds``: of sparse graphs, see `Compilation`;
    ``estimator_seconds``; ``break_even_step``: so many sparse steps gain back both of these;
    ``verdict``: one sentence.
    """
    found = {
        "sparse_tokens": _sparse_tokens(tally),
        "sliced": _sliced(runtime, rows),
        "graphs": len(compilations),
        "traced": flops is not None,
        **_predicted(flops or TracedFlops(None, None)),
        **_times(runtime.speed.verdict),
        "compile_seconds": _seconds(runtime.compilations),
        "estimator_seconds": runtime.estimator_seconds,
    }
    if runtime.collector is not None and runtime.collector.estimator is not None:
        found["estimator_seconds"] += runtime.collector.estimator.seconds
    found["break_even_step"] = _break_even(found, runtime.speed.verdict)
    found["verdict"] = f"Does it pay? {_verdict(rows, found, runtime.speed.verdict, tally)}"
    return found


def _sparse_tokens(tally: TokenTally) -> float | None:
    if tally.calls:
        return tally.sparse / max(tally.real, 1)
    return 1.0 if tally.all_sparse else None


def _sliced(runtime: Runtime, rows: Sequence[LinearRow]) -> float:
    sizes = {w.name: w.out_features * w.in_features for w in runtime.frozen}
    return sum(sizes[row.name] for row in rows if row.sliced) / max(1, sum(sizes.values()))


def _seconds(compilations: Sequence[Compilation]) -> float | None:
    took = [one.seconds for one in compilations if one.kind == SPARSE]
    return sum(took) if took else None


def _predicted(flops: TracedFlops) -> dict[str, Any]:
    dense, sparse = flops.dense, flops.sparse
    ratio = dense.total / sparse.total if dense and sparse and sparse.total else None
    return {
        "dense_flops": dense and dense.total,
        "sparse_flops": sparse and sparse.total,
        "choosing_flops": sparse and sparse.choosing,
        "predicted_ratio": ratio,
    }


def _times(measured: Verdict | None) -> dict[str, Any]:
    if measured is None:
        return dict.fromkeys(("measured_ratio", "dense_ms", "sparse_ms"))
    return {
        "measured_ratio": 1 / measured.ratio,
        "dense_ms": measured.dense_ms,
        "sparse_ms": measured.sparse_ms,
    }


def _break_even(found: dict[str, Any], measured: Verdict | None) -> int | None:
    if measured is None or not measured.pays or found["compile_seconds"] is None:
        return None
    spent: float = found["compile_seconds"] + found["estimator_seconds"]
    return math.ceil(1e3 * spent / (measured.dense_ms - measured.sparse_ms))


def _verdict(
    rows: Sequence[LinearRow], found: dict[str, Any], measured: Verdict | None, tally: TokenTally
) -> str:
    if measured is not None and not measured.pays:
        return f"No: {measured}. Training stays dense."
    if measured is not None:
        even = found["break_even_step"]
        return f"Yes: {measured}" + (f"; paid for after {even} sparse steps." if even else ".")
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
        return f"No: a sparse step needs {1 / ratio:.2f}x the FLOPs of a dense one."
    share = "an unknown share" if sparse is None else f"{sparse:.0%}"
    skips = f"{share} of the tokens skip channels of {done} of {len(linears)} frozen linears"
    if ratio is None:
        return f"Pass a batch to predict it; {skips}, and no step was timed."
    return f"By FLOPs {ratio:.2f}x, not measured yet: {skips}."


def worth_lines(worth: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people: a name and a text each."""
    tokens, ratio = worth["sparse_tokens"], worth["measured_ratio"]
    lines = [("tokens sparse", "not known yet" if tokens is None else f"{tokens:.1%}")]
    if worth["predicted_ratio"] is not None:
        parts = (worth[f"{kind}_flops"] for kind in ("dense", "sparse", "choosing"))
        dense, sparse, choosing = map(big, parts)
        text = f"{dense} dense, {sparse} sparse, of which {choosing} choose channels"
        lines += [("FLOPs of a step", text), ("predicted", f"{worth['predicted_ratio']:.2f}x")]
    elif worth["traced"]:
        lines.append(("predicted", "an op of this model cannot be counted"))
    else:
        lines.append(("predicted", "pass a batch to count FLOPs"))
    times = f"{worth['dense_ms'] or 0:.3g} ms dense, {worth['sparse_ms'] or 0:.3g} ms sparse"
    lines.append(("measured", "not measured yet" if ratio is None else f"{ratio:.2f}x: {times}"))
    compiling = worth["compile_seconds"]
    text = "not compiled yet" if compiling is None else f"{compiling:.1f} s"
    lines.append(("compile, estimator", f"{text}, {worth['estimator_seconds']:.1f} s"))
    even = worth["break_even_step"]
    unknown = "not known before steps are timed" if ratio is None else "not reached"
    lines.append(("break-even", unknown if even is None else f"after {even} sparse steps"))
    return lines


def big(count: int) -> str:
    """``1.86e+13`` -> ``18.6 T``"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
