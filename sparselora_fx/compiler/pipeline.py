"""Run the passes over a graph and its bodies, and lift what they chose to the graph's outputs.

Knows no pass by name. ``TORCH_LOGS="+sparselora_fx"`` shows one numbered line for each pass, and
what each changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import fx

from sparselora_fx.analysis.token_order import token_inputs, token_orders
from sparselora_fx.compiler import checkpointing, spec
from sparselora_fx.compiler.lift_outputs import Lifted, lift_outputs, report_of
from sparselora_fx.compiler.pass_log import PassLog
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.compiler.unread_inputs import drop_unread
from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.emit import unwatch
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.ir.ops import MARKERS
from sparselora_fx.rewrite.rewrite import Options, Program, Rewrite, TracedCall

Pass = Callable[[Rewrite], int]
WholePass = Callable[[Program], int]
Subject = TypeVar("Subject")  # what a step rewrites


def run(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    options: Options,
    passes: Sequence[Pass],
    whole: Sequence[WholePass] = (),
    call: TracedCall | None = None,
    log: PassLog | None = None,
) -> GraphReport | None:
    """Rewrite a Dynamo graph in place: ``whole`` see it with its bodies, ``passes`` one by one.
    ``log`` follows. Returns what was done, or None (graph untouched) if no site is marked in it."""
    if not any(_is_marked(module) for module in gm.modules()):
        return None
    call = call or TracedCall()
    program = Program(gm, inputs, options, call)
    program.batch, program.passed = token_inputs(gm, inputs, call.arguments)
    own = gm.graph.find_nodes(op="placeholder")
    given = program.passed | {own[i] for i in call.buffers}
    beside = frozenset(own[i] for i in call.beside_text)
    program.orders = token_orders(gm, program.batch, given, beside)
    log = log or PassLog()
    log.begin(gm, "", of=len(whole) + len(passes))
    for first in whole:
        log.after(gm, "", first.__name__, *_timed(first, program))
    rewrites: dict[fx.GraphModule, Rewrite] = {}
    frozen = frozenset(own[i] for i in call.frozen)
    _rewrite_all(_Part(gm, "", frozen), program, passes, rewrites, log)
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


class _Part(NamedTuple):
    """A graph or a body of it: its name there, and its inputs that hold frozen weights."""

    gm: fx.GraphModule
    name: str
    frozen: frozenset[fx.Node]


def _rewrite_all(
    part: _Part,
    program: Program,
    passes: Sequence[Pass],
    rewrites: dict[fx.GraphModule, Rewrite],
    log: PassLog,
) -> None:
    gm = part.gm
    for node, body, operands in bodies(gm):
        if body not in rewrites:
            held = zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
            inside = frozenset(node for node, given in held if given in part.frozen)
            _rewrite_all(_Part(body, node.name, inside), program, passes, rewrites, log)
    if not _is_marked(gm):
        return
    rewrite = rewrites[gm] = Rewrite(
        gm, program.options, program.padding_unread, program.orders, program.batch, program.passed,
        part.frozen,
    )  # fmt: skip
    if part.name:
        log.begin(gm, part.name, of=len(passes))
    for step in passes:
        changes, seconds = _timed(step, rewrite)
        rewrite.counts[step.__name__] = rewrite.counts.get(step.__name__, 0) + changes
        log.after(gm, part.name, step.__name__, changes, seconds)
        if changes:
            spec.check(rewrite, step.__name__)


def _timed(step: Callable[[Subject], int], subject: Subject) -> tuple[int, float]:
    start = time.perf_counter()
    changes = step(subject)
    return changes, time.perf_counter() - start
