"""Which rows of an activation are which tokens of the batch, where it has more of them or fewer.

A learned prompt in front of the batch's tokens makes ``[B, P + L, D]`` of ``[B, L, D]``; what says
of the batch's tokens which count must then say it of those rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from sparselora_fx.analysis.row_kinds import Joined, Part, TokenRows, Whole
from sparselora_fx.analysis.token_liveness import LiveRows, needed
from sparselora_fx.graph.nodes import argument, op_name, reads_shape_only, tensor

_IN_PLACE = LiveRows(0, 1, ())


def token_rows(
    graph: fx.Graph, batch: frozenset[fx.Node], passed: frozenset[fx.Node]
) -> dict[fx.Node, TokenRows | None]:
    """Of the nodes ``[B, rows, ...]`` that are made of the batch's tokens: which rows they are;
    None where that cannot be told. Nodes that have nothing to do with the tokens are left out.

    ``batch``: the graph's inputs that hold the tokens; ``passed``: all that the model's caller
    gave. What a part of a model is given besides may be made of the tokens too.

    Lattice:    no entry (not made of tokens), then `Whole`, `Part` and `Joined`, then None.
    Direction:  forward, once.
    Rule:       an embedding, and what works row by row (`token_liveness.needed`), keeps the rows of
                its inputs if they agree; ``cat`` along rows joins, ``x[:, a:b]`` takes a part.
    Sound:      row i of a result is made of row i of the input alone, or the entry is None; inputs
                that another part of the model may have computed begin as None.
    """
    found: dict[fx.Node, TokenRows | None] = {}
    for node in graph.nodes:
        if node in batch:
            found[node] = Whole()
        elif node.op == "placeholder":
            if node not in passed and _is_handed_on(node):
                found[node] = None
        elif any(n in found and not reads_shape_only(node, n) for n in node.all_input_nodes):
            found[node] = _rows_of(node, found)
    return found


def _rows_of(node: fx.Node, found: Mapping[fx.Node, TokenRows | None]) -> TokenRows | None:
    example = tensor(node)
    if example is None or example.dim() < 2:
        return None
    name = op_name(node)
    if name == "embedding":
        return found.get(argument(node, 0, "input"))
    if name in ("cat", "concat") and _along_rows(node):
        return _joined(node, found)
    if name == "getitem" and (part := _part(node, found)) is not None:
        return part
    kept = (n for n in node.all_input_nodes if found.get(n) is not None)
    rows = {found[n] for n in kept if needed(node, n, {node: _IN_PLACE}) == _IN_PLACE}
    return rows.pop() if len(rows) == 1 else None


def _joined(node: fx.Node, found: Mapping[fx.Node, TokenRows | None]) -> TokenRows | None:
    pieces = argument(node, 0, "tensors")
    parts: list[TokenRows | fx.Node] = []
    for piece in pieces:
        rows = found.get(piece, piece)
        if rows is None:
            return None
        parts.append(rows)
    return Joined(tuple(parts))


def _part(node: fx.Node, found: Mapping[fx.Node, TokenRows | None]) -> TokenRows | None:
    """What ``x[:, a:b]`` is of the rows of x."""
    source, key = node.args
    rows = found.get(source)  # type: ignore[arg-type]
    if rows is None or not isinstance(key, tuple) or len(key) < 2:
        return None
    plain = all(k is Ellipsis or k == slice(None) for k in (key[0], *key[2:]))
    if not plain or key[0] is Ellipsis or not isinstance(key[1], slice):
        return None
    return Part(rows, key[1].start, key[1].stop, key[1].step)


def _along_rows(node: fx.Node) -> bool:
    example, dim = tensor(node), argument(node, 1, "dim", 0)
    return example is not None and dim % example.dim() == 1


def _is_handed_on(node: fx.Node) -> bool:
    """Whether an input may be what another part of the model has computed."""
    example = tensor(node)
    if example is None or isinstance(example, torch.nn.Parameter) or example.dim() < 2:
        return False
    named = any(word in str(node.target) for word in ("_buffers_", "_parameters_"))
    return example.dtype.is_floating_point and not named
