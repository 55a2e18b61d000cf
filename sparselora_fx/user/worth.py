"""Does it pay? What is known of it: tokens, compilation, and a plain verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparselora_fx.compiler.report import Compilation
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.speed_check import Verdict
from sparselora_fx.runtime.tally import TokenTally
from sparselora_fx.user.linear_rows import LinearRow


def worth_of(
    runtime: Runtime,
    rows: Sequence[LinearRow],
    tally: TokenTally,
    compilations: Sequence[Compilation],
    *,
    traced: bool,
) -> dict[str, Any]:
    """Figures by name, None where nobody knows.

    ``sparse_tokens``: the share of tokens that were sparse, of those that are no padding;
    ``sliced``: the share of the frozen linears' weights that belongs to rewritten ones; ``graphs``;
    ``compile_seconds``: the compiler's, see `Compilation`; ``measured_ratio``: time of a sparse
    step over that of a dense one, as `SpeedCheck` found it; ``break_even_step``: so many sparse
    steps gain what compiling has cost; ``traced``; ``verdict``: one sentence.
    """
    sparse = None
    if tally.calls:
        sparse = tally.sparse / max(tally.real, 1)
    elif tally.all_sparse:
        sparse = 1.0
    sizes = {w.name: w.out_features * w.in_features for w in runtime.frozen}
    done = sum(sizes[row.name] for row in rows if row.sliced)
    measured = runtime.speed.verdict
    seconds = None if traced else sum(one.seconds for one in compilations)
    even = None
    if measured is not None and measured.pays and seconds is not None:
        even = math.ceil(1e3 * seconds / (measured.dense_ms - measured.sparse_ms))
    return {
        "sparse_tokens": sparse,
        "sliced": done / max(1, sum(sizes.values())),
        "graphs": len(compilations),
        "compile_seconds": seconds,
        "measured_ratio": None if measured is None else measured.ratio,
        "break_even_step": even,
        "traced": traced,
        "verdict": _verdict(rows, sparse, measured, even, few=tally.only_dense),
    }


def _verdict(
    rows: Sequence[LinearRow],
    sparse: float | None,
    measured: Verdict | None,
    even: int | None,
    *,
    few: bool,
) -> str:
    if measured is not None and not measured.pays:
        return f"Does it pay? No: {measured}. Training stays dense."
    if measured is not None:
        gained = "" if even is None else f"; compiling is paid for after {even} sparse steps"
        return f"Does it pay? Yes: {measured}{gained}."
    linears = [row for row in rows if row.linear]
    if few:
        return (
            "Does it pay? No: hardly a token is sparse, and such steps run dense (min_sparse). Set "
            "the labels of the prompt to -100, or let output tokens be sparse, too."
        )
    if not any(row.sliced for row in linears):
        if any(row.waiting for row in linears):
            return "Does it pay? Not known before a training step: pass a batch to look ahead."
        return "Does it pay? No: nothing is sliced, so a step costs what torch.compile's does."
    share = "an unknown share" if sparse is None else f"{sparse:.0%}"
    return (
        f"Does it pay? {share} of the tokens skip channels of "
        f"{sum(row.sliced for row in linears)} of {len(linears)} frozen linears; time a step of "
        "each kind to know (docs/performance.md has what others gained)."
    )
