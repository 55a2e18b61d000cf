"""Where a traced graph may be cut: between the repeated blocks of the model that it came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import fx

from sparselora_fx.graph.nodes import changes_input, op_name

_FEWEST = 3  # blocks: with fewer no two are alike, as the first one's input needs no gradient
_OPENS = ("_enter_autocast", "_vmap_increment_nesting", "_grad_increment_nesting")
_CLOSES = ("_exit_autocast", "_vmap_decrement_nesting", "_grad_decrement_nesting")


def partition(gm: fx.GraphModule, blocks: Iterable[str]) -> list[list[fx.Node]] | None:
    """The nodes of the graph between its inputs and its output, cut where a block begins or ends;
    None if that may not be."""
    # A value that is written to may be read through another piece's input.
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    if any(changes_input(node) for graph in graphs for node in graph.nodes):
        return None
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    block_of = _block_finder(blocks)
    runs: list[list[fx.Node]] = [[]]
    current, depth, grad = "", 0, True
    seen = set()
    for node in nodes:
        block = block_of(node)
        if block is not None and block != current and not depth and grad:
            runs.append([])
            current = block
            seen.add(block)
        runs[-1].append(node)
        name = op_name(node)
        depth += (name in _OPENS) - (name in _CLOSES)
        grad = bool(node.args[0]) if name == "_set_grad_enabled" else grad
    return [run for run in runs if run] if len(seen - {""}) >= _FEWEST else None


def _block_finder(blocks: Iterable[str]) -> Callable[[fx.Node], str | None]:
    """Which block a node was traced in: "" for none of them, None if the node does not say."""
    names = list(dict.fromkeys(blocks))
    found: dict[str, str] = {}

    def block_of(node: fx.Node) -> str | None:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        path = list(stack.values())[-1][0]
        if path not in found:
            found[path] = _block_at(path, names)
        return found[path]

    return block_of


def _block_at(path: str, names: list[str]) -> str:
    """The block that a module's path leads into, or "".

    A path is ``L['self'].model.layers.0.mlp`` or ``L['self'].__dict__['_modules']['model']...``;
    ``self`` is the model, or the part of it in which tracing began again after a graph break.
    """
    words = [w for w in re.findall(r"\w+", path) if w not in ("L", "self", "__dict__", "_modules")]
    for end, word in enumerate(words, start=1):
        if word.isdigit():
            part = f".{'.'.join(words[:end])}"
            for name in names:
                if f".{name}".endswith(part) or part.endswith(f".{name}"):
                    return name
    return ""
