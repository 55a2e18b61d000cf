"""Move channel gathers up to the producers, so that nothing outside the selection is computed."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.channels import CASTS
from sparselora_fx.fx import argument, is_pointwise, op_name, tensor
from sparselora_fx.ops import OPS
from sparselora_fx.regions import Rewrite

_GATHER = OPS.gather_channels.default
_SCATTER = OPS.scatter_channels.default
_ROWS = OPS.channel_rows.default


def sink_gathers(rewrite: Rewrite) -> int:
    """Push every `gather_channels` towards what it gathers from. Returns the moves made.

    Before:  h: [T, N] = silu(scatter(c, s) + b);            d: [T, k] = gather(h, s)
    After:   d: [T, k] = silu(c + gather(b, s))              when nothing else reads h
    Rules:   gather(f(a, b))       -> f(gather(a), gather(b))            f pointwise
             gather(scatter(c, s)) -> c, or the part of c that is asked  (the round trip)
             gather(linear(z, B))  -> sliced_linear(z, B)                (a LoRA branch's up-projection)
             gather(x[..., a:b:c]) -> gather(x) at the composed rows     (halves of a fused projection)
             gather(dropout(a, p)) -> gather(a) * gather(dropout(1, p))  (the same random mask)
    Keeps:   every value; moves a gather only past a node that nothing but gathers reads, so work never grows.
    """
    moves = 0
    todo = [node for node in rewrite.graph.nodes if node.target is _GATHER]
    while todo:
        gather = todo.pop()
        source = gather.args[0]
        if source is None or not all(user.target is _GATHER for user in source.users):
            continue
        replacement = _sink(rewrite.graph, gather, source)
        if replacement is None:
            continue
        new, more = replacement
        gather.replace_all_uses_with(new)
        rewrite.graph.erase_node(gather)
        if not source.users and source.op != "placeholder":
            _erase_dead(rewrite.graph, source)
        todo += more
        moves += 1
    return moves


def _sink(graph: fx.Graph, gather: fx.Node, source: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    idx = gather.args[1]
    assert isinstance(idx, fx.Node)
    if source.target is _SCATTER:
        return _round_trip(graph, gather, source, idx)
    if op_name(source) in ("getitem", "chunk", "split", "narrow"):
        return _through_slice(graph, gather, source, idx)
    if tensor(source) is None:
        return None
    with graph.inserting_before(gather):
        if op_name(source) == "linear":
            return _through_linear(graph, source, idx)
        if op_name(source) == "dropout":
            return _through_dropout(graph, source, idx)
        if _keeps_last(source) or op_name(source) in CASTS or is_pointwise(source):
            return _through_pointwise(graph, source, idx)
    return None


def _keeps_last(node: fx.Node) -> bool:
    """A reshape that moves tokens only."""
    if op_name(node) not in ("view", "reshape") or not isinstance(node.args[0], fx.Node):
        return False
    before, after = tensor(node.args[0]), tensor(node)
    sizes = node.args[1:] if len(node.args) > 2 else argument(node, 1, "shape")
    last = sizes[-1] if isinstance(sizes, list | tuple) else sizes
    same = before is not None and after is not None and before.shape[-1] == after.shape[-1]
    return same and isinstance(last, int)


def _through_pointwise(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    out = tensor(source)
    assert out is not None
    gathers: list[fx.Node] = []

    def gathered(node: fx.Node) -> fx.Node:
        example = tensor(node)
        if example is None or example.dim() == 0 or example.shape[-1] != out.shape[-1]:
            return node
        gathers.append(graph.call_function(_GATHER, (node, idx)))
        return gathers[-1]

    memo: dict[fx.Node, fx.Node] = {}
    new = graph.node_copy(source, lambda n: memo.setdefault(n, gathered(n)) if n not in memo else memo[n])
    new.meta = {}
    if _keeps_last(source):
        sizes = source.args[1:] if len(source.args) > 2 else argument(source, 1, "shape")
        new.args, new.kwargs = (new.args[0], (*sizes[:-1], _width(idx))), {}
    return new, gathers


def _width(idx: fx.Node) -> int:
    """How many channels an index node selects."""
    base, _, _, offsets = _as_rows(idx)
    kept = base.args[1]  # the selection is topk_channels(scores, k)
    assert isinstance(kept, int)
    return kept * len(offsets)


def _through_linear(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    x, weight, bias = (argument(source, i, n) for i, n in enumerate(("input", "weight", "bias")))
    kept = graph.call_function(OPS.sliced_linear.default, (x, weight, idx))
    if bias is None:
        return kept, []
    part = graph.call_function(_GATHER, (bias, idx))
    return graph.call_function(torch.add, (kept, part)), []


def _through_dropout(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    if argument(source, 3, "inplace", False) is not False or len(source.users) != 1:
        return None
    x = source.args[0]
    with graph.inserting_before(source):  # at the same place in the order of random draws
        ones = graph.call_function(torch.ones_like, (x,))
        mask = graph.call_function(source.target, (ones, *source.args[1:]), dict(source.kwargs))  # type: ignore[arg-type]
    values = graph.call_function(_GATHER, (x, idx))
    scale = graph.call_function(_GATHER, (mask, idx))
    return graph.call_function(torch.mul, (values, scale)), [values]


def _round_trip(
    graph: fx.Graph, gather: fx.Node, source: fx.Node, idx: fx.Node
) -> tuple[fx.Node, list[fx.Node]] | None:
    """gather(scatter(c, rows), idx): c itself, or one block of it when idx is one offset of rows."""
    kept, rows = source.args[0], source.args[1]
    assert isinstance(kept, fx.Node) and isinstance(rows, fx.Node)
    if rows is idx:
        return kept, []
    base, inner, stride, offsets = _as_rows(idx)
    base2, inner2, stride2, offsets2 = _as_rows(rows)
    if base is not base2 or (inner, stride) != (inner2, stride2) or offsets[0] not in offsets2:
        return None
    at = offsets2.index(offsets[0])
    if offsets2[at : at + len(offsets)] != offsets:
        return None
    if offsets2 == offsets:
        return kept, []
    count = _width(base)
    with graph.inserting_before(gather):
        args = (kept, -1, at * count, len(offsets) * count)
        return graph.call_function(torch.narrow, args), []


def _as_rows(idx: fx.Node) -> tuple[fx.Node, int, int, list[int]]:
    """An index node as ``(channels, inner, outer_stride, offsets)``."""
    if idx.target is _ROWS:
        return idx.args  # type: ignore[return-value]
    return idx, 1, 1, [0]


def _through_slice(
    graph: fx.Graph, gather: fx.Node, source: fx.Node, idx: fx.Node
) -> tuple[fx.Node, list[fx.Node]] | None:
    found = _slice_of(source)
    base, inner, stride, offsets = _as_rows(idx)
    if found is None or inner != 1:
        return None
    parent, start, step = found
    with graph.inserting_before(gather):
        args = (base, 1, stride * step, [start + step * offset for offset in offsets])
        rows = graph.call_function(_ROWS, args)
        new = graph.call_function(_GATHER, (parent, rows))
    return new, [new]


def _slice_of(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """``(parent, start, step)`` when a node is ``parent[..., start::step]`` or one piece of a last-dimension split."""
    parent = node.args[0]
    if op_name(node) != "getitem" or not isinstance(parent, fx.Node):
        return None
    key = node.args[1]
    if isinstance(key, int) and op_name(parent) in ("chunk", "split"):
        whole, pieces = parent.args[0], parent.meta.get("example_value")
        example = tensor(whole)
        axis = argument(parent, 2, "dim", 0)
        if example is None or not isinstance(pieces, tuple | list) or axis % example.dim() != example.dim() - 1:
            return None
        if any(user.op != "call_function" or op_name(user) != "getitem" for user in parent.users):
            return None
        assert isinstance(whole, fx.Node)
        return whole, sum(int(piece.shape[-1]) for piece in pieces[:key]), 1
    example = tensor(parent)
    if example is None or not isinstance(key, tuple) or not isinstance(key[-1], slice):
        return None
    lead = key[:-1]
    plain = all(k is Ellipsis or k == slice(None) for k in lead)
    full = Ellipsis in lead or len(key) == example.dim()
    start, step = key[-1].start or 0, key[-1].step or 1
    if not (plain and full and isinstance(start, int) and isinstance(step, int)):
        return None
    return parent, start % int(example.shape[-1]), step


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads any more, so that its inputs are seen to have gathers as their only readers."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if op_name(source) in ("getitem", "chunk", "split"):
            _erase_dead(graph, source)
