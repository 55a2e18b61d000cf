"""Move channel gathers up to the producers, so that nothing outside the selection is computed."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.graph.emit import copied
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import argument, op_name, tensor
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.gather_motion import (
    Moved,
    channel_gather_of,
    dropout_mask,
    hoist_all,
    keeps_last,
    share,
    slice_of,
)
from sparselora_fx.rewrite.rewrite import Rewrite

_GATHER = OPS.gather_channels.default
_SCATTER = OPS.scatter_channels.default
_ROWS = OPS.channel_rows.default


def hoist_channel_gathers(rewrite: Rewrite) -> int:
    """Push every `gather_channels` towards what it gathers from. Returns the moves made.

    Before:  h: [T, N] = silu(scatter(c, s) + b);            d: [T, k] = gather(h, s)
    After:   d: [T, k] = silu(c + gather(b, s))              when nothing but gathers reads h
    Rules:   gather(f(a, b))       -> f(gather(a), gather(b))            f pointwise
             gather(scatter(c, s)) -> c, or the part of c that is asked  (the round trip)
             gather(linear(z, B))  -> sliced_linear(z, B)                (a LoRA branch's
             up-projection)
             gather(x[..., a:b:c]) -> gather(x) at the composed rows     (halves of a fused
             projection)
             gather(dropout(a, p)) -> gather(a) * gather(dropout(1, p))  (the same random mask)
             gather(h, s), again   -> the first of them                  (two linears read h, say)
    Keeps:   every value; moves a gather only past a node that nothing but gathers reads, so work
             never grows.
    Source:  as query compilers push projections down to the tables they read; equal gathers
             are one by common subexpression elimination.
    """
    graph = rewrite.graph
    shared = share(graph, _GATHER)
    return shared + hoist_all(graph, _GATHER, lambda gather, source: _hoist(graph, gather, source))


def _hoist(graph: fx.Graph, gather: fx.Node, source: fx.Node) -> Moved | None:
    idx = gather.args[1]
    assert isinstance(idx, fx.Node)
    if source.target is _SCATTER:
        return _round_trip(graph, gather, source, idx)
    with graph.inserting_before(gather):
        if op_name(source) == "getitem":
            return _through_slice(graph, source, idx)
        if tensor(source) is None:
            return None
        if op_name(source) == "linear":
            return _through_linear(graph, source, idx)
        if op_name(source) == "dropout":
            return _through_dropout(graph, source, idx)
        if keeps_last(source) and op_name(source) in ("view", "reshape"):
            return _through_view(graph, source, idx)
        if op_name(source) in CASTS or is_pointwise(source):
            return _through_pointwise(graph, source, idx)
    return None


def _through_pointwise(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> Moved:
    out = tensor(source)
    assert out is not None
    gathers: dict[fx.Node, fx.Node] = {}

    def gathered(node: fx.Node) -> fx.Node:
        example = tensor(node)
        if example is None or not same_shape(example.shape[-1:], out.shape[-1:]):
            return node
        if node not in gathers:
            gathers[node] = channel_gather_of(graph, node, idx)
        return gathers[node]

    return Moved(copied(source, gathered), list(gathers.values()))


def _through_view(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> Moved | None:
    sizes = source.args[1:] if len(source.args) > 2 else argument(source, 1, "shape")
    if not isinstance(sizes, tuple | list) or not isinstance(source.args[0], fx.Node):
        return None
    gather = channel_gather_of(graph, source.args[0], idx)
    new = graph.call_method("reshape", (gather, (*sizes[:-1], _width(idx))))
    return Moved(new, [gather])


def _width(idx: fx.Node) -> int:
    """How many channels an index node selects."""
    if idx.target is torch.cat:  # the rows of a fused projection, part by part
        parts = argument(idx, 0, "tensors")
        return sum(_width(part) for part in parts)
    base, _, _, offsets = _as_rows(idx)
    # The selection is topk_channels(scores, k), or arange(n) where every channel is kept.
    kept = base.args[0] if base.target is torch.arange else base.args[1]
    assert isinstance(kept, int)
    return kept * len(offsets)


def _through_linear(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> Moved:
    x, weight, bias = (argument(source, i, n) for i, n in enumerate(("input", "weight", "bias")))
    kept = graph.call_function(OPS.sliced_linear.default, (x, weight, idx))
    if bias is not None:
        part = graph.call_function(_GATHER, (bias, idx))
        kept = graph.call_function(torch.add, (kept, part))
    return Moved(kept, [])


def _through_dropout(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> Moved | None:
    mask = dropout_mask(graph, source)
    if mask is None:
        return None
    assert isinstance(source.args[0], fx.Node)
    values = channel_gather_of(graph, source.args[0], idx)
    new = graph.call_function(torch.mul, (values, channel_gather_of(graph, mask, idx)))
    return Moved(new, [values])


def _round_trip(graph: fx.Graph, gather: fx.Node, source: fx.Node, idx: fx.Node) -> Moved | None:
    """gather(scatter(c, rows), idx): c itself, or one block of it when idx is one offset of
    rows."""
    kept, rows = source.args[0], source.args[1]
    assert isinstance(kept, fx.Node) and isinstance(rows, fx.Node)
    if rows is idx:
        return Moved(kept, [])
    base, inner, stride, offsets = _as_rows(idx)
    other, *strides, available = _as_rows(rows)
    if base is not other or strides != [inner, stride] or offsets[0] not in available:
        return None
    at = available.index(offsets[0])
    if available[at : at + len(offsets)] != offsets:
        return None
    with graph.inserting_before(gather):
        count = _width(base)
        part = graph.call_function(torch.narrow, (kept, -1, at * count, len(offsets) * count))
    return Moved(part, [])


def _as_rows(idx: fx.Node) -> tuple[fx.Node, int, int, list[int]]:
    """An index node as ``(channels, inner, outer_stride, offsets)``."""
    if idx.target is _ROWS:
        channels, inner, stride, offsets = idx.args
        return channels, inner, stride, list(offsets)  # type: ignore[return-value, arg-type]
    return idx, 1, 1, [0]


def _rows(graph: fx.Graph, base: fx.Node, stride: int, offsets: list[int]) -> fx.Node:
    """``channel_rows(base, 1, stride, offsets)``, one for all readers, right after the channels."""
    args = (base, 1, stride, offsets)
    known = next((user for user in base.users if user.target is _ROWS and user.args == args), None)
    if known is not None:
        base.append(known)
        return known
    with graph.inserting_after(base):
        return graph.call_function(_ROWS, args)


def _through_slice(graph: fx.Graph, source: fx.Node, idx: fx.Node) -> Moved | None:
    found = slice_of(source)
    base, inner, stride, offsets = _as_rows(idx)
    if found is None or inner != 1:
        return None
    parent, start, step = found
    rows = _rows(graph, base, stride * step, [start + step * offset for offset in offsets])
    new = channel_gather_of(graph, parent, rows)
    return Moved(new, [new])
