"""Compute queries only for tokens whose attention output is read: the others cannot change it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import (
    argument,
    axis_argument,
    changes_input,
    is_pointwise,
    op_name,
    reads_shape_only,
    tensor,
)
from sparselora_fx.layout import same_count
from sparselora_fx.movement import order_of
from sparselora_fx.ops import OPS
from sparselora_fx.regions import Rewrite
from sparselora_fx.sinking import slice_of, take_of
from sparselora_fx.values import CASTS, NORMS, PERMUTES, REDUCTIONS, RESHAPES

_TAKE = OPS.take_tokens.default
_ATTENTION = "scaled_dot_product_attention"
_MATMULS = ("matmul", "bmm")
Lists = tuple[Any, ...]  # the (idx, pos) nodes of one token list
Rows = dict[fx.Node, tuple[int, Lists]]  # node -> (its token axis, the only list whose rows matter)


def trim_queries(rewrite: Rewrite) -> int:
    """Give attention the queries of one token list alone where its other rows are not read.
    Returns the queries trimmed.

    Before:  q: [B, L, N] = linear(x, wq);  a = attention(heads(q), k, v);  t = take(a, o)
    After:   z: [P, N] = take(linear(x, wq), o);  q = where(o.pos >= 0, place(z, o), z[0])
             a = attention(heads(q), k, v);  t = take(a, o)
    Keeps:   every row that is read, and every gradient: a row of the attention depends on its own
             query alone, and what an unread row would pass back is zero. Unread rows hold a query
             of the list, not zeros, whose norm may have no derivative.
    Skips:   queries that anything else reads. `sink_takes`, run again, then moves the take past the
             projection and its LoRA branch.
    """
    graph = rewrite.graph
    rows = _read_rows(graph)
    found = [node for node in rows if _is_last_row_of_tokens(node, rows)]
    for node in found:
        _trim(graph, node, rows[node][1])
    return len(found)


def _read_rows(graph: fx.Graph) -> Rows:
    """The nodes of which only the rows of one token list can reach the graph's outputs."""
    rows: Rows = {}
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if dead.issuperset(node.users) and not changes_input(node):
            dead.add(node)
        if tensor(node) is None:
            continue
        live = [user for user in node.users if user not in dead]
        readers = [user for user in live if not reads_shape_only(user, node)]
        needs = {_needed(user, node, rows) for user in readers}
        if len(needs) == 1 and (only := needs.pop()) is not None:
            rows[node] = only
    return rows


def _needed(user: fx.Node, node: fx.Node, rows: Rows) -> tuple[int, Lists] | None:
    """The rows of a node that a user of it needs; None: all, or unknown."""
    x, out = tensor(node), tensor(user)
    assert x is not None
    if user.target is _TAKE:
        return (1, user.args[1:]) if user.args[0] is node and x.dim() == 3 else None
    if user not in rows or out is None or changes_input(user):
        return None
    axis, lists = rows[user]
    source = _source_axis(user, node, x, out, axis)
    return None if source is None else (source, lists)


def _source_axis(
    user: fx.Node, node: fx.Node, x: torch.Tensor, out: torch.Tensor, axis: int
) -> int | None:
    """The axis of x along which row i alone makes row i of ``out`` along ``axis``; None if there is
    none."""
    name, rank = op_name(user), out.dim()
    if name in PERMUTES:
        order = order_of(user, name, x.dim())
        return None if order is None else order[axis]
    if name in RESHAPES:
        lead = axis + 1
        kept = min(x.dim(), rank) > axis and _same(x.shape[:lead], out.shape[:lead])
        return axis if kept and x.dim() > lead and rank > lead else None
    if x.dim() != rank or not _same(x.shape[axis : axis + 1], out.shape[axis : axis + 1]):
        return None
    keeps = (
        name in CASTS
        or (name in ("cat", "concat") and axis_argument(user, 1, "dim", rank) != axis)
        or (name == "getitem" and slice_of(user) is not None and axis < rank - 1)
        or (name == "softmax" and axis_argument(user, 1, "dim", rank, -1) != axis)
        or (name in NORMS and rank - len(argument(user, 1, "normalized_shape")) > axis)
        or (name in REDUCTIONS and _along_last(user, name, rank) and axis < rank - 1)
        or (name == "linear" and _is_only(user, node, "input") and axis < rank - 1)
        or (name in _MATMULS and _is_only(user, node, "input") and axis == rank - 2)
        or (name == _ATTENTION and _is_only(user, node, "query") and axis == rank - 2)
        or name == "dropout"
        or is_pointwise(user)
    )
    return axis if keeps else None


def _same(left: Any, right: Any) -> bool:
    return all(map(same_count, zip(left, strict=True), zip(right, strict=True)))


def _along_last(user: fx.Node, name: str, rank: int) -> bool:
    """Whether a reduction is over the last dimension alone."""
    dim = argument(user, 2 if "norm" in name else 1, "dim")
    dims = list(dim) if isinstance(dim, tuple | list) else [dim]
    return len(dims) == 1 and isinstance(dims[0], int) and dims[0] % rank == rank - 1


def _is_only(user: fx.Node, node: fx.Node, name: str) -> bool:
    """Whether a node is a call's first argument and none of the others."""
    others = [*user.args[1:], *(v for k, v in user.kwargs.items() if k != name)]
    return argument(user, 0, name) is node and node not in others


def _is_last_row_of_tokens(node: fx.Node, rows: Rows) -> bool:
    """Whether a node ``[B, L, N]`` is what attention makes its heads of: takes move no further down
    than here."""
    example = tensor(node)
    if example is None or example.dim() != 3 or rows[node][0] != 1:
        return False
    inner = [user for user in node.users if user in rows]
    ends = (_ATTENTION, *_MATMULS)
    return any(tensor(u).dim() != 3 or op_name(u) in ends for u in inner)  # type: ignore[union-attr]


def _trim(graph: fx.Graph, node: fx.Node, lists: Lists) -> None:
    idx, pos = lists
    take = take_of(graph, node, lists)
    users = [user for user in graph.nodes if user in node.users and user is not take]
    with graph.inserting_before(users[0]):
        placed = graph.call_function(OPS.place_tokens.default, (take, idx, pos))
        held = graph.call_method("unsqueeze", (graph.call_function(torch.ge, (pos, 0)), -1))
        filler = graph.call_method("detach", (graph.call_method("narrow", (take, 0, 0, 1)),))
        trimmed = graph.call_function(torch.where, (held, placed, filler))
    for new in (take, placed, trimmed):
        new.meta["example_value"] = node.meta["example_value"]
    for user in users:
        user.replace_input_with(node, trimmed)
