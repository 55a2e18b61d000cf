"""`explain`: what became of every frozen linear, and why."""

from __future__ import annotations

from torch import nn

from sparselora_fx.model.adapter_kinds import UNTRACEABLE, WHY, adapter_kind, adapter_words
from sparselora_fx.model.frozen_weights import FrozenWeight, frozen_stacks
from sparselora_fx.model.opaque import opaque_modules
from sparselora_fx.runtime.runtime import Runtime, get_runtime

_STACK = "dense: a stack of matrices, one for each expert or head, is no linear"
_UNREACHED = (
    "its module did not run, an adapter computes another weight from this one, or a graph break "
    "inside a checkpointed block left the block to plain PyTorch"
)
_EAGER = (
    "its module runs in code that torch.compile leaves to plain PyTorch: behind a graph break, in "
    "a function that is kept from compiling, or with the compiler switched off"
)
_PAST = (
    "training ran past the compiled forward, so nothing was sliced; call the model that "
    "sparselora_fx.compile returned, not a module inside it"
)

_FEW = (
    "hardly a token was sparse in any step so far, and such steps run dense (the plan's min_sparse)"
)


def explain(model: nn.Module) -> str:
    """A table of every frozen linear: its region, k of N kept channels, and "rewritten" or the
    reason it is dense. Frozen stacks of matrices (experts) follow.

    Filled by the graphs that ran, so call it after a training step; before one, each line tells the
    plan. Raises `CompileError` if the model is not compiled.
    """
    runtime = get_runtime(model)
    rows = [("frozen linear", "shape", "region", "kept", "status")]
    rows += [_row(runtime, weight) for weight in runtime.frozen]
    count = len(rows) - 1
    rows += [
        (name, "x".join(map(str, shape)), "-", "-", _STACK) for name, shape in frozen_stacks(model)
    ]
    rows += [(item.name, "-", "-", "-", f"dense: {item.why}") for item in opaque_modules(model)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    done = sum(row[4].startswith("rewritten") for row in rows)
    lines.append(f"{done} of {count} frozen linears rewritten; {runtime.graphs} graphs compiled")
    if runtime.tally.describe():
        lines.append(runtime.tally.describe())
    if runtime.speed.verdict is not None:
        lines.append(runtime.speed.describe())
    if runtime.cuda_graphs is not None and runtime.cuda_graphs.used:
        lines.append(runtime.cuda_graphs.describe())
    if runtime.collector is not None:
        lines.append(runtime.collector.describe())
    return "\n".join(lines)


def _row(runtime: Runtime, weight: FrozenWeight) -> tuple[str, str, str, str, str]:
    name, shape = weight.name, f"{weight.out_features}x{weight.in_features}"
    seen = runtime.seen.get(name)
    if max(runtime.sparsity[name]) == 0:
        return name, shape, "-", "-", "dense: the plan keeps it dense (sparsity 0)"
    adapter = adapter_words(adapter_kind(runtime.model, weight))
    if seen is None:
        return name, shape, "-", "-", _why_unseen(runtime, weight)
    if not seen.sliced:
        return name, shape, "-", "-", f"dense: {seen.report.reason}{adapter}"
    status = f"rewritten ({'rows' if seen.report.role == 'out' else 'columns'})"
    uses = seen.sliced + len(seen.dense)
    if seen.dense:
        status += f" in {seen.sliced} of its {uses} uses, dense in others: {seen.dense[0]}"
    elif uses > 1:
        status += f", {uses} uses, each with a choice of its own"
    if weight.packed is not None:
        status += f", unpacked from {weight.packed.quantiser}"
    return name, shape, f"{seen.region} [{seen.kind}]", seen.kept, status


def _why_unseen(runtime: Runtime, weight: FrozenWeight) -> str:
    """Why no graph has told anything of a weight that the plan makes sparse."""
    if runtime.blocks and not any(weight.name.startswith(f"{block}.") for block in runtime.blocks):
        return "dense: outside the blocks that regional=True compiles"
    inputs, held = runtime.trace_inputs, id(weight.traced)
    kind = adapter_kind(runtime.model, weight)
    if kind in UNTRACEABLE:
        return f"dense: its adapter, {kind}, {WHY[kind]}"
    if runtime.stepped or runtime.seen:
        why = _EAGER if held in inputs.eager else _UNREACHED
        return f"dense: no compiled graph multiplies with it ({why})"
    if runtime.tally.only_dense:
        return f"dense: {_FEW}"
    if runtime.dense_calls:
        return f"dense in every training call so far ({', '.join(sorted(runtime.dense_calls))})"
    if held in inputs.past:
        return f"dense: {_PAST}"
    sparsity = runtime.sparsity[weight.name]
    planned = f"ffn {sparsity.ffn:g}, attention {sparsity.attention:g}"
    return f"not traced yet (plan: {planned}); run a training step"
