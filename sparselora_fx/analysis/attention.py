"""Recognise attention in any of its spellings, from the channels of its operands.

Fused (`scaled_dot_product_attention`, `flex_attention`) or written out (scores = q k^T, any
pointwise function and softmax, then probabilities times v). Nothing here looks at module or class
names.
"""

from __future__ import annotations

import itertools
import math

from torch import fx

from sparselora_fx.analysis.channel_moves import permuted
from sparselora_fx.analysis.channel_values import AttentionLogits, Channels, Port, Value, Values
from sparselora_fx.analysis.regions import Attention, Heads, Site
from sparselora_fx.graph.layout import Atom, Layout, same_shape
from sparselora_fx.graph.nodes import argument, op_name, tensor

_FUSED = {"scaled_dot_product_attention", "flex_attention"}
_PRODUCTS = {"matmul", "bmm", "__matmul__"}


def attention_value(node: fx.Node, values: Values) -> Value | None:
    """The value of an attention's score or mix node, or None if the node is neither.

    Lattice:    that of `channel_flow`, and between products `AttentionLogits`: (query, key).
    Direction:  forward, one call.
    Rule:       channels times channels are scores; scores (or a fused attention's queries and keys)
                with values are a mix, whose heads are read off the layouts. Queries and keys meet
                channel by channel over the longest run that both hold.
    Sound:      ``q k^T`` is a sum over head channels: leaving one out of both leaves its term out,
                whatever function comes between. Heads whose layouts do not say which key head they
                share make a mix without ports, which no region is built on.
    """
    name = op_name(node)
    if name in _FUSED:
        operands = [argument(node, i, key) for i, key in enumerate(("query", "key", "value"))]
        held = [values.get(operand) for operand in operands]
        if all(isinstance(value, Channels) for value in held):
            return _mix(node, *held)  # type: ignore[arg-type]
        return None
    if name in _PRODUCTS:
        operands = [argument(node, i, key) for i, key in enumerate(("input", "mat2"))]
    elif name == "baddbmm":
        operands = [argument(node, i, key) for i, key in ((1, "batch1"), (2, "batch2"))]
    else:
        return None
    left, right = (values.get(operand) for operand in operands)
    if isinstance(left, AttentionLogits) and isinstance(right, Channels):
        return _mix(node, left.query, left.key, right)
    if isinstance(left, Channels) and isinstance(right, Channels):
        key = _transposed(operands[1], right)
        roots = left.roots | right.roots
        return AttentionLogits(left, key, roots) if left.ports and key.ports else None
    return None


def _transposed(operand: fx.Node, value: Channels) -> Channels:
    """Keys as [..., tokens, channels] again, from the [..., channels, tokens] that a matmul
    takes."""
    example = tensor(operand)
    assert example is not None
    rank = example.dim()
    return permuted(value, [*range(rank - 2), rank - 1, rank - 2])


def _mix(node: fx.Node, query: Channels, key: Channels, value: Channels) -> Channels | None:
    """The attention's output as a source of its own: channel ``head * value_dim + d``."""
    out = tensor(node)
    if out is None:
        out = (node.meta.get("example_value") or (None,))[0]
    roots = query.roots | key.roots | value.roots
    v = operand_heads(value)
    pair = None if v is None else _pair(query, key, v.number)
    if out is None or v is None or pair is None:
        return Channels((), roots)
    q, k = pair
    group_inner = k.repeat_outer == 1 and v.repeat_outer == 1
    layout = _output_layout((query, value), tuple(out.shape), q.number, v.dim)
    if layout is None or (not group_inner and (k.repeat_inner, v.repeat_inner) != (1, 1)):
        return Channels((), roots)
    source = Attention(node, q, k, v, group_inner, roots)
    return Channels((Port(source, layout),), frozenset([source]) | roots, moved=True)


def _pair(query: Channels, key: Channels, kv_heads: int) -> tuple[Heads, Heads] | None:
    """The queries and keys that meet channel by channel: all of a head, or the longest run of its
    channels that both hold in kv_heads heads (the others stay as they are)."""
    found: list[tuple[Heads, Heads]] = []
    keys = _runs(key)
    for start, q in _runs(query):
        for other, k in keys:
            low, high = max(start, other), min(start + q.dim, other + k.dim)
            if low < high and _compatible(q, k, kv_heads):
                found.append(
                    (
                        q._replace(offset=q.offset + low - start, dim=high - low),
                        k._replace(offset=k.offset + low - other, dim=high - low),
                    )
                )
    return max(found, key=lambda pair: pair[0].dim, default=None)


def _compatible(q: Heads, k: Heads, kv_heads: int) -> bool:
    if k.number != kv_heads:
        return False
    return q.number % kv_heads == 0 and q.repeat_inner * q.repeat_outer == 1


def _runs(value: Channels) -> list[tuple[int, Heads]]:
    """The runs of head channels that belong to one site: ``(first channel, heads)``."""
    segments = value.segments
    whole = operand_heads(value)
    if whole is not None or segments is None or segments.axis != -1:
        return [] if whole is None else [(0, whole)]
    runs, start = [], 0
    for size, part in segments.parts:
        heads = None if part is None else operand_heads(part)
        if heads is not None and heads.dim == size:
            runs.append((start, heads))
        start += size
    return runs


def _output_layout(
    operands: tuple[Channels, ...], shape: tuple[int, ...], heads: int, dim: int
) -> Layout | None:
    """The layout of the mix: as an operand's, with head h at stride ``dim`` and its channels at
    stride 1."""
    parts = [(c, *(p for _, p in c.segments.parts)) if c.segments else (c,) for c in operands]
    ports = [port for c in itertools.chain(*parts) if c is not None for port in c.ports]
    for model in (port.layout for port in ports):
        if model is not None and len(model.dims) == len(shape) and same_shape(shape[-1:], (dim,)):
            found = _renumbered(model, heads, dim)
            if found is not None:
                return found
    return None


def _renumbered(model: Layout, heads: int, dim: int) -> Layout | None:
    dims = [
        tuple(Atom(a.size, None) for a in d if a.stride is None) if model.is_token(i) else d
        for i, d in enumerate(model.dims)
    ]
    stride = dim * heads
    for axis, atoms in enumerate(dims[:-1]):
        renumbered: list[Atom] = []
        for atom in atoms:
            if atom.stride is None or atom.size == 1:
                renumbered.append(atom)
                continue
            stride //= int(atom.size)
            renumbered.append(Atom(atom.size, stride))
        dims[axis] = tuple(renumbered)
    dims[-1] = (Atom(dim, 1),)
    return Layout(0, tuple(dims)) if stride == dim else None


def operand_heads(value: Channels) -> Heads | None:
    """Read heads and head channels off an operand ``[..., tokens, D]`` whose first port has a full
    layout."""
    port = next(
        (p for p in value.ports if isinstance(p.source, Site) and p.layout is not None), None
    )
    if port is None or port.layout is None or not isinstance(port.source, Site):
        return None
    if any(other.source is not port.source for other in value.ports):
        return None
    layout = port.layout
    inner = layout.channel_atoms(len(layout.dims) - 1)
    outer = [a for axis in range(len(layout.dims) - 1) for a in layout.channel_atoms(axis)]
    outer = [atom for atom in outer if atom.stride is not None]
    if len(inner) != 1 or inner[0].stride != 1 or not isinstance(inner[0].size, int):
        return None
    if any(not isinstance(atom.size, int) for atom in outer):
        return None
    moving = [i for i, atom in enumerate(outer) if atom.stride != 0]
    first, last = (moving[0], moving[-1] + 1) if moving else (0, 0)
    if any(atom.stride == 0 for atom in outer[first:last]):
        return None
    repeats = [math.prod(int(a.size) for a in part) for part in (outer[last:], outer[:first])]
    return Heads(
        port.source, layout.offset, tuple(outer[first:last]), inner[0].size, repeats[0], repeats[1]
    )
