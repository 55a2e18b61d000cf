"""Run the passes over a graph and its bodies, and lift what they chose to the graph's outputs.

Knows no pass by name. ``TORCH_LOGS="sparselora_fx"`` shows one numbered line for each pass;
``"+sparselora_fx"`` also what each changed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from sparselora_fx.analysis.token_order import token_inputs, token_orders
from sparselora_fx.compiler import checkpointing, spec
from sparselora_fx.compiler.lift_outputs import Lifted, lift_outputs, report_of
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.compiler.unread_inputs import drop_unread
from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.emit import unwatch
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.ir.ops import MARKERS
from sparselora_fx.rewrite.rewrite import Options, Program, Rewrite, TracedCall

log = logging.getLogger(__name__)

Pass = Callable[[Rewrite], int]
WholePass = Callable[[Program], int]


def run(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    options: Options,
    passes: Sequence[Pass],
    whole: Sequence[WholePass] = (),
    call: TracedCall | None = None,
) -> GraphReport | None:
    """Rewrite a Dynamo graph in place: ``whole`` see it with its bodies, ``passes`` one by one.
    Returns what was done, or None (graph untouched) if no site is marked in it."""
    if not any(_is_marked(module) for module in gm.modules()):
        return None
    call = call or TracedCall()
    program = Program(gm, inputs, options, call)
    program.batch, program.passed = token_inputs(gm, inputs, call.arguments)
    program.orders = token_orders(gm, program.batch)
    for number, first in enumerate(whole, start=1):
        _timed(first, program, number, len(whole) + len(passes))
    rewrites: dict[fx.GraphModule, Rewrite] = {}
    own = gm.graph.find_nodes(op="placeholder")
    frozen = frozenset(own[i] for i in call.frozen)
    _rewrite_all(gm, program, frozen, passes, rewrites, len(whole))
    if not rewrites:
        return None
    lifted_of: dict[fx.GraphModule, Lifted] = {}
    lifted = lift_outputs(gm, rewrites, lifted_of)
    report = report_of(gm, lifted, rewrites, drop_unread(gm, lifted.weights()))
    for module in lifted_of:
        unwatch(module)
        module.graph.lint()
        module.recompile()
    checkpointing.save_selections(gm)
    return report


def _is_marked(module: object) -> bool:
    if not isinstance(module, fx.GraphModule):
        return False
    return any(op_name(node) in MARKERS for node in module.graph.nodes)


def _rewrite_all(
    gm: fx.GraphModule,
    program: Program,
    frozen: frozenset[fx.Node],
    passes: Sequence[Pass],
    rewrites: dict[fx.GraphModule, Rewrite],
    before: int,
) -> None:
    for _, body, operands in bodies(gm):
        if body not in rewrites:
            held = zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
            inside = frozenset(node for node, given in held if given in frozen)
            _rewrite_all(body, program, inside, passes, rewrites, before)
    if not _is_marked(gm):
        return
    rewrite = rewrites[gm] = Rewrite(
        gm, program.options, program.padding_unread, program.orders, program.batch, program.passed,
        frozen,
    )  # fmt: skip
    for number, step in enumerate(passes, start=before + 1):
        counted = _op_counts(gm.graph) if log.isEnabledFor(logging.DEBUG) else None
        changes = _timed(step, rewrite, number, before + len(passes))
        rewrite.counts[step.__name__] = rewrite.counts.get(step.__name__, 0) + changes
        if changes:
            spec.check(rewrite, step.__name__)
        if counted is not None:
            log.debug("%s", _difference(counted, _op_counts(gm.graph)))
            log.debug("after %s:\n%s", step.__name__, gm.graph)


def _timed(step: Callable[[Any], int], subject: object, number: int, total: int) -> int:
    start = time.perf_counter()
    changes = step(subject)
    milliseconds = 1e3 * (time.perf_counter() - start)
    name = step.__name__
    log.info("%d/%d %s: %d matched in %.1f ms", number, total, name, changes, milliseconds)
    return changes


def _op_counts(graph: fx.Graph) -> Counter[str]:
    return Counter(map(op_name, graph.nodes))


def _difference(before: Counter[str], after: Counter[str]) -> str:
    """``linear: 12 -> 8 (-4), take: 0 -> 2 (+2)``, or that nothing has changed."""
    changed = sorted(name for name in {*before, *after} if before[name] != after[name])
    lines = [f"{n}: {before[n]} -> {after[n]} ({after[n] - before[n]:+d})" for n in changed]
    return ", ".join(lines) or "graph unchanged"
