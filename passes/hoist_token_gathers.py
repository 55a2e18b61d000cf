"""Move token gathers up to the producers, so that context and output tokens are computed apart,
and padding not at all."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.graph.emit import copied
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import argument, op_name, operand, tensor
from sparselora_fx.graph.op_families import CASTS, NORMS
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.gather_motion import (
    Moved,
    dropout_mask,
    hoist_all,
    is_whole,
    keeps_last,
    slice_of,
    token_gather_of,
)
from sparselora_fx.rewrite.respell import columns
from sparselora_fx.rewrite.rewrite import Rewrite

_GATHER = OPS.gather_tokens.default
_SCATTER_TWO = OPS.scatter_two_lists.default
_SCATTER = OPS.scatter_tokens.default
_ROWWISE = NORMS | {"mean", "sum"}
Lists = tuple[fx.Node, ...]  # the (idx, pos) nodes of one token list


def hoist_token_gathers(rewrite: Rewrite) -> int:
    """Push every `gather_tokens` towards what it gathers from. Returns the moves made.

    Before:  h: [B, L, N] = silu(scatter_two(y, z, c, o) + b)
             d: [P, N] = gather(h, c);          e: [Q, N] = gather(h, o)
    After:   d: [P, N] = silu(y + b);           e: [Q, N] = silu(z + b)
             when nothing but gathers reads h
    Rules:   gather(f(a, b))         -> f(gather(a), gather(b))      f pointwise
             gather(scatter_two(y, z, c, o), c) -> y                 (the round trip)
             gather(scatter(y, c), c) -> y                           filled with other rows or not
             gather(view(a))         -> gather(a)                    a view of tokens only
             gather(x[..., a:b:c])   -> gather(x)[..., a:b:c]        halves of a fused projection
             gather(linear(z, B))    -> linear(gather(z), B)         B wider than its input (a LoRA
                                                                     up-projection), or any B if
                                                                     one list is all that is read
             gather(mean(a, -1))     -> mean(gather(a), -1)          and norms over channels
             gather(dropout(a, p))   -> gather(a) * gather(dropout(1, p))      the same random mask
    Keeps:   every value that is read; moves a gather only past a node that nothing but gathers
             reads.
    Source:  as query compilers push selections down to the tables they read.
    """
    graph = rewrite.graph
    return hoist_all(graph, _GATHER, lambda gather, source: _hoist(graph, gather, source))


def _hoist(graph: fx.Graph, gather: fx.Node, source: fx.Node) -> Moved | None:
    lists = (operand(gather, 1), operand(gather, 2))
    if source.target is _SCATTER_TWO:
        parts = {source.args[2]: source.args[0], source.args[4]: source.args[1]}
        part = parts.get(lists[0])
        return Moved(part, []) if isinstance(part, fx.Node) else None
    scattered = source.args[1] if op_name(source) == "where" else source
    if (
        isinstance(scattered, fx.Node)
        and scattered.target is _SCATTER
        and scattered.args[1] is lists[0]
    ):
        kept = operand(scattered)
        return Moved(kept, [])
    if tensor(source) is None:
        return None
    with graph.inserting_before(gather):
        if keeps_last(source) or is_whole(source):
            new = token_gather_of(graph, operand(source), lists)
            return Moved(new, [new])
        if op_name(source) == "getitem":
            return _through_slice(graph, source, lists)
        if op_name(source) == "linear":
            return _through_linear(graph, source, lists)
        if op_name(source) == "dropout":
            return _through_dropout(graph, source, lists)
        if op_name(source) in _ROWWISE:
            return _through_rowwise(graph, source, lists)
        if op_name(source) in CASTS or is_pointwise(source):
            return _through_pointwise(graph, source, lists)
    return None


def _through_pointwise(graph: fx.Graph, source: fx.Node, lists: Lists) -> Moved | None:
    out = tensor(source)
    assert out is not None
    if any(_kind(node, out) == "other" for node in source.all_input_nodes):
        return None
    gathers: dict[fx.Node, fx.Node] = {}

    def gathered(node: fx.Node) -> fx.Node:
        kind = _kind(node, out)
        if kind == "tokens":
            if node not in gathers:
                gathers[node] = token_gather_of(graph, node, lists)
            return gathers[node]
        if kind == "channels":
            example = tensor(node)
            assert example is not None
            return graph.call_method("reshape", (node, (example.shape[-1],)))
        return node

    return Moved(copied(source, gathered), list(gathers.values()))


def _kind(node: fx.Node, out: torch.Tensor) -> str:
    """How an operand meets the tokens: "tokens" (one value or row a token), "channels", "scalar",
    or "other"."""
    example = tensor(node)
    if example is None or example.dim() <= 1:
        return "scalar"
    lead = example.shape[:-1]
    if all(isinstance(size, int) and size == 1 for size in lead):
        return "channels"
    return "tokens" if example.dim() == out.dim() and same_shape(lead, out.shape[:-1]) else "other"


def _through_slice(graph: fx.Graph, source: fx.Node, lists: Lists) -> Moved | None:
    found, example = slice_of(source), tensor(source)
    if found is None or example is None:
        return None
    parent, start, step = found
    gather = token_gather_of(graph, parent, lists)
    new = columns(gather, slice(start, start + step * (int(example.shape[-1]) - 1) + 1, step))
    return Moved(new, [gather])


def _through_linear(graph: fx.Graph, source: fx.Node, lists: Lists) -> Moved | None:
    x, weight, bias = (argument(source, i, n) for i, n in enumerate(("input", "weight", "bias")))
    example = tensor(weight)
    # The rows of one list are fewer than all; two lists may gather what is cheaper to gather after.
    alone = all(user.args[1] is lists[0] for user in source.users)
    known = example is not None and all(isinstance(size, int) for size in example.shape)
    if example is None or not (alone or (known and example.shape[0] > example.shape[1])):
        return None
    gather = token_gather_of(graph, x, lists)
    new = graph.call_function(torch.nn.functional.linear, (gather, weight, bias))
    return Moved(new, [gather])


def _through_rowwise(graph: fx.Graph, source: fx.Node, lists: Lists) -> Moved | None:
    """A norm, or a reduction, of each token's own channels."""
    x = source.args[0] if source.args else None
    example = tensor(x)
    if not isinstance(x, fx.Node) or example is None or example.dim() < 2:
        return None
    args, kwargs = list(source.args), dict(source.kwargs)
    if op_name(source) in NORMS:
        shape = argument(source, 1, "normalized_shape")
        if not isinstance(shape, tuple | list) or len(shape) != 1:
            return None
    else:
        dim = argument(source, 1, "dim")
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        keeps = argument(source, 2, "keepdim", False)
        if not isinstance(dim, int) or dim % example.dim() != example.dim() - 1 or not keeps:
            return None
        args, kwargs = [x], {**kwargs, "dim": -1, "keepdim": True}
    gather = token_gather_of(graph, x, lists)
    new = graph.create_node(source.op, source.target, (gather, *args[1:]), kwargs)
    return Moved(new, [gather])


def _through_dropout(graph: fx.Graph, source: fx.Node, lists: Lists) -> Moved | None:
    mask = dropout_mask(graph, source)
    if mask is None:
        return None
    assert isinstance(source.args[0], fx.Node)
    values = token_gather_of(graph, source.args[0], lists)
    new = graph.call_function(torch.mul, (values, token_gather_of(graph, mask, lists)))
    return Moved(new, [values])
