"""Compute queries only for tokens whose attention output is read: the others cannot change it."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.token_liveness import (
    ATTENTION,
    DEAD,
    MATMULS,
    Lists,
    Rows,
    gathered_by,
    read_rows,
)
from sparselora_fx.graph.mutation import is_mutated
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.ir.markers import TokenList
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.gather_motion import token_gather_of
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.token_split import filled


def trim_queries(rewrite: Rewrite) -> int:
    """Give attention the queries of one token list alone where its other rows are not read.
    Returns the queries trimmed.

    Before:  q: [B, L, N] = linear(x, wq);  a = attention(heads(q), k, v);  t = gather(a, o)
    After:   z: [P, N] = gather(linear(x, wq), o);  q = where(o.pos >= 0, scatter(z, o), z[0])
             a = attention(heads(q), k, v);  t = gather(a, o)
    Keeps:   every row that is read, and every gradient: a row of the attention depends on its own
             query alone, and what an unread row would pass back is zero. Unread rows hold a query
             of the list, not zeros, whose norm may have no derivative.
    Skips:   queries that anything else reads or writes into. `hoist_token_gathers`, run again, then
             moves the gather past the projection and its LoRA branch.
    Source:  liveness analysis, of rows instead of variables.
    """
    graph = rewrite.graph
    rows = read_rows(graph, gathered_by)
    found = [node for node in rows if _is_last_row_of_tokens(node, rows)]
    for node in found:
        _trim(graph, node, rows[node].lists)
    return len(found)


def _is_last_row_of_tokens(node: fx.Node, rows: Rows) -> bool:
    """Whether a node ``[B, L, N]`` is what attention makes its heads of: gathers move no further
    down than here."""
    example = tensor(node)
    if example is None or example.dim() != 3 or rows[node].axis != 1 or node.op == "placeholder":
        return False
    if is_mutated(node) or _is_trimmed(node, rows[node].lists):
        return False
    inner = [user for user in node.users if rows.get(user, DEAD) != DEAD]
    ends = (ATTENTION, *MATMULS)
    return any(tensor(u).dim() != 3 or op_name(u) in ends for u in inner)  # type: ignore[union-attr]


def _is_trimmed(node: fx.Node, lists: Lists) -> bool:
    """Whether a node is what this pass puts in the place of queries."""
    scattered = node.args[1] if op_name(node) == "where" else None
    made = isinstance(scattered, fx.Node) and scattered.target is OPS.scatter_tokens.default
    return made and scattered.args[1:] == lists  # type: ignore[union-attr]


def _trim(graph: fx.Graph, node: fx.Node, lists: Lists) -> None:
    pair = TokenList(*(part for part in lists if isinstance(part, fx.Node)))
    gather = token_gather_of(graph, node, tuple(pair))
    users = [user for user in graph.nodes if user in node.users and user is not gather]
    with graph.inserting_before(users[0]):
        trimmed = filled(graph, gather, pair)
    for user in users:
        user.replace_input_with(node, trimmed)
