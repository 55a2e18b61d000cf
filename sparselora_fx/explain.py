"""`explain`: what became of every frozen linear, and why."""

from __future__ import annotations

from torch import nn

from sparselora_fx.frozen import frozen_stacks
from sparselora_fx.recording import get_state
from sparselora_fx.state import State

_STACK = "dense: a stack of matrices, one for each expert or head, is no linear"
_UNREACHED = (
    "its module did not run, an adapter computes another weight from this one, or a graph break "
    "inside a checkpointed block left the block to plain PyTorch"
)


def explain(model: nn.Module) -> str:
    """A table of every frozen linear: its region, k of N kept channels, and "rewritten" or the
    reason it is dense. Frozen stacks of matrices (experts) follow.

    Filled by the graphs that ran, so call it after a training step; before one, each line tells the
    plan. Raises `CompileError` if the model is not compiled.
    """
    state = get_state(model)
    rows = [("frozen linear", "shape", "region", "kept", "status")]
    rows += [
        _row(state, weight.name, f"{weight.out_features}x{weight.in_features}")
        for weight in state.frozen
    ]
    count = len(rows) - 1
    rows += [
        (name, "x".join(map(str, shape)), "-", "-", _STACK) for name, shape in frozen_stacks(model)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    done = sum(row[4].startswith("rewritten") for row in rows)
    lines.append(f"{done} of {count} frozen linears rewritten; {state.graphs} graphs compiled")
    if state.cuda_graphs is not None and state.cuda_graphs.used:
        lines.append(state.cuda_graphs.describe())
    if state.collector is not None:
        lines.append(state.collector.describe())
    return "\n".join(lines)


def _row(state: State, name: str, shape: str) -> tuple[str, str, str, str, str]:
    sparsity = state.sparsity[name]
    seen = state.seen.get(name)
    if sparsity.ffn == 0 and sparsity.attention == 0:
        return name, shape, "-", "-", "dense: the plan keeps it dense (sparsity 0)"
    if seen is None and state.blocks and not any(name.startswith(f"{b}.") for b in state.blocks):
        return name, shape, "-", "-", "dense: outside the blocks that regional=True compiles"
    if seen is None and (state.seen or state.stepped):
        return name, shape, "-", "-", f"dense: no compiled graph multiplies with it ({_UNREACHED})"
    if seen is None:
        words = f"ffn {sparsity.ffn:g}, attention {sparsity.attention:g}"
        return name, shape, "-", "-", f"not traced yet (plan: {words}); run a training step"
    if seen.report.role == "dense":
        return name, shape, "-", "-", f"dense: {seen.report.reason}"
    which = "rows" if seen.report.role == "out" else "columns"
    return name, shape, f"{seen.region} [{seen.kind}]", seen.kept, f"rewritten ({which})"
