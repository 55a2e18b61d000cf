"""`graphs`: what each pass did to each graph, and the graphs themselves."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparselora_fx.compiler.pass_log import PassHook
from sparselora_fx.compiler.report import Compilation
from sparselora_fx.errors import CompileError
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.tracing import trace


@dataclass(frozen=True)
class Graphs:
    """The graphs of a compiled model, one `Compilation` each; print it for a table of the passes.

    Attributes:
        compilations: in the order of compilation; ``log.records`` has one record for each pass.
        traced: they were traced on a batch, so that their texts are there.
    """

    compilations: tuple[Compilation, ...]
    traced: bool = False

    def __str__(self) -> str:
        lines = [line for one in self.compilations for line in _table(one)]
        lines = lines or ["no graph was compiled yet; pass a batch, or run a training step"]
        if not self.traced:
            lines.append("slx.graphs(model, batch) also has each graph before and after each pass")
        return "\n".join(lines)

    def before(self, name: str = "", *, graph: int = 1, part: str = "") -> str:
        """A graph as it was before a pass (before all of them, if none is named).

        Args:
            name: of a pass.
            graph: the number of a compilation, from 1.
            part: "" for the graph itself, else the name of a body in it.

        Raises:
            CompileError: there is no such graph, body or pass, or no batch was traced.
        """
        return self._around(name, graph, part)[0]

    def after(self, name: str = "", *, graph: int = 1, part: str = "") -> str:
        """A graph as it was after a pass (after all of them); see `before`."""
        return self._around(name, graph, part)[1]

    def difference(self, name: str = "", *, graph: int = 1, part: str = "") -> str:
        """What a pass (or all of them) changed in a graph, as a unified diff; "" for nothing."""
        before, after = self._around(name, graph, part)
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "before", "after", lineterm=""
        )
        return "\n".join(lines)

    def _around(self, name: str, graph: int, part: str) -> tuple[str, str]:
        """The text before a pass and after it; a pass that runs several times counts as one."""
        if not self.traced:
            raise CompileError(
                "the texts of graphs are not kept in training; trace a batch: "
                "sparselora_fx.graphs(model, batch)"
            )
        found = {one.number: one for one in self.compilations}.get(graph)
        if found is None or not found.log.start:
            rewritten = [one.number for one in self.compilations if one.log.start]
            raise CompileError(f"graph is {graph!r}; graphs that passes saw: {rewritten or 'none'}")
        if part not in found.log.start:
            raise CompileError(f"part is {part!r}; parts of graph {graph}: {list(found.log.start)}")
        text = found.log.start[part]
        texts = [("", text)]
        for record in found.log.records:
            if record.part == part:
                text = record.text or text
                texts.append((record.name, text))
        places = [i for i, (passed, _) in enumerate(texts) if i and name in ("", passed)]
        if not places:
            known = ", ".join(dict.fromkeys(passed for passed, _ in texts[1:]))
            raise CompileError(f"no pass {name!r} saw this graph; those that did: {known}")
        return texts[places[0] - 1][1], texts[places[-1]][1]


def graphs(
    model: nn.Module,
    batch: Mapping[str, object] | None = None,
    *,
    after_pass: PassHook | None = None,
) -> Graphs:
    """What the passes did to each graph of a compiled model.

    Without a batch: the graphs compiled so far, with the ops that each pass added and took away.
    With one: what a sparse step on it would compile, with the text of every graph. It is traced,
    not run; nothing of the model or its compiled graphs changes, and no cache can hide a pass.

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, as in training.
        after_pass: called as ``after_pass(record, graph_module)`` after each pass. With a batch:
            of this trace. Without: of every compilation of this model from now on; there it may
            change the graph, which must keep its inputs and outputs.

    Raises:
        CompileError: the model is not compiled.
    """
    runtime = get_runtime(model)
    if batch is not None:
        traced = trace(runtime, batch, texts=True, hook=after_pass)
        return Graphs(tuple(traced.compilations), traced=True)
    if after_pass is not None:
        runtime.after_pass = after_pass
    return Graphs(tuple(runtime.compilations))


def _table(one: Compilation) -> list[str]:
    """The passes of one graph that changed something, each with the ops that came and went."""
    sizes = f", batch {one.batch}" if one.batch else ""
    took = f", compiled in {one.seconds:.1f} s" if one.seconds else ""
    lines = [f"graph {one.number} ({one.kind}){sizes}: {one.nodes} calls{took}"]
    for record in one.log.records:
        if record.changes:
            name = f"{record.name} in {record.part}" if record.part else record.name
            what = f"{record.changes} changes in {1e3 * record.seconds:.1f} ms"
            lines.append(f"  {record.number:2}/{record.total} {name}: {what}")
            lines += [f"       {record.difference}"] if record.difference else []
    return lines
