"""`explain`: what became of every frozen linear, why the rest is dense, and whether it pays."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparselora_fx.runtime.runtime import Runtime, get_runtime
from sparselora_fx.runtime.tracing import Traced, trace
from sparselora_fx.user.explanation import Explanation, explanation
from sparselora_fx.user.linear_rows import linear_rows
from sparselora_fx.user.worth import worth_of


def explain(
    model: nn.Module, batch: Mapping[str, object] | None = None, *, verbose: bool = False
) -> Explanation:
    """What happened to a compiled model's frozen linears, why the rest is dense, and does it pay.

    A region is one row, alike layers are folded into ranges (``layers.3-30.mlp``), and names are
    keys of a plan. Returns a string that also has ``rows``, ``regions``, ``dense``, ``worth``,
    ``to_json()``, and shows itself as a table in a notebook.

    Without a batch it tells of the graphs that ran, so call it after a training step; before one,
    of the plan. With a batch it tells what a sparse step on that would do: the step is traced, not
    run, and nothing changes.

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, as in training.
        verbose: one line for each frozen linear, with its shape, instead of the folded rows.

    Raises:
        CompileError: the model is not compiled.
    """
    runtime = get_runtime(model)
    traced = None if batch is None else trace(runtime, batch)
    return explain_trace(runtime, traced, verbose=verbose)


def explain_trace(runtime: Runtime, traced: Traced | None, *, verbose: bool = False) -> Explanation:
    """The same for a batch that was traced; None: for the graphs that ran."""
    seen = runtime.seen if traced is None else traced.seen
    if runtime.given_up:  # hooks may be off, so that a trace shows nothing
        seen = {**runtime.seen, **seen}
    tally = runtime.tally if traced is None else traced.tally
    rows = linear_rows(runtime, seen, tally, traced=traced is not None)
    compilations = runtime.compilations if traced is None else traced.compilations
    worth = worth_of(runtime, rows, tally, compilations, traced)
    return explanation(rows, worth, _notes(runtime, traced), verbose=verbose)


def _notes(runtime: Runtime, traced: Traced | None) -> list[str]:
    """Lines about the model as a whole."""
    notes = [(runtime if traced is None else traced).tally.describe()]
    if traced is not None:
        return [note for note in notes if note]
    seconds = sum(one.seconds for one in runtime.compilations)
    notes += [f"compilation: {seconds:.1f} s in all"] if runtime.compilations else []
    notes += [runtime.speed.describe(), runtime.safety.describe()]
    if runtime.cuda_graphs is not None and runtime.cuda_graphs.used:
        notes.append(runtime.cuda_graphs.describe())
    if runtime.collector is not None:
        notes.append(runtime.collector.describe())
    return [note for note in notes if note]
