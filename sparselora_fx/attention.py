"""Recognise attention in any of its spellings, from the channels of its operands.

Fused (`scaled_dot_product_attention`, `flex_attention`) or written out (scores = q k^T, any
pointwise function and
softmax, then probabilities times v). Nothing here looks at module or class names.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from sparselora_fx.fx import argument, op_name, tensor
from sparselora_fx.layout import Atom, Layout
from sparselora_fx.regions import Attention, Site
from sparselora_fx.values import Channels, Port, Scores, Value, Values

_FUSED = {"scaled_dot_product_attention", "flex_attention"}
_PRODUCTS = {"matmul", "bmm", "__matmul__"}


class Heads(NamedTuple):
    """How one operand's head and head-channel dimensions move through its site's rows."""

    site: Site
    offset: int
    heads: int
    head_stride: int
    groups: int  # heads come in this many even runs (1, or the kv heads where q, k and v alternate)
    group_stride: int
    dim: int
    repeat_inner: int  # repeats of each head (repeat_kv)
    repeat_outer: int  # repeats of the whole set of heads


def attention_value(node: fx.Node, values: Values) -> Value | None:
    """The value of an attention's score or mix node, or None if the node is neither."""
    name = op_name(node)
    if name in _FUSED:
        operands = [argument(node, i, key) for i, key in enumerate(("query", "key", "value"))]
        held = [values.get(operand) for operand in operands]
        if all(isinstance(value, Channels) for value in held):
            return _mix(node, *held)  # type: ignore[arg-type]
        return None
    if name in _PRODUCTS:
        left, right = (
            values.get(argument(node, i, key)) for i, key in enumerate(("input", "mat2"))
        )
    elif name == "baddbmm":
        left, right = (
            values.get(argument(node, i, key)) for i, key in ((1, "batch1"), (2, "batch2"))
        )
    else:
        return None
    if isinstance(left, Scores) and isinstance(right, Channels):
        return _mix(node, left.query, left.key, right)
    if isinstance(left, Channels) and isinstance(right, Channels):
        key = _transposed(right)
        roots = left.roots | right.roots
        return Scores(left, key, roots) if left.ports and key.ports else None
    return None


def _transposed(value: Channels) -> Channels:
    """Keys as [..., tokens, channels] again, from the [..., channels, tokens] that a matmul
    takes."""
    ports = []
    for port in value.ports:
        layout = port.layout
        if layout is not None:
            rank = len(layout.dims)
            layout = layout.permute([*range(rank - 2), rank - 1, rank - 2])
        ports.append(Port(port.source, layout))
    return Channels(tuple(ports), value.roots, value.moved)


def _mix(node: fx.Node, query: Channels, key: Channels, value: Channels) -> Channels | None:
    """The attention's output as a source of its own: channel ``head * value_dim + d``."""
    out = tensor(node)
    if out is None:
        out = (node.meta.get("example_value") or (None,))[0]
    q, k, v = (operand_heads(operand) for operand in (query, key, value))
    roots = query.roots | key.roots | value.roots
    if out is None or q is None or k is None or v is None:
        return Channels((), roots)
    heads, kv_heads = q.heads, k.heads
    if q.groups not in (1, kv_heads) or k.groups != 1 or v.groups != 1:
        return Channels((), roots)
    if (
        kv_heads != v.heads
        or heads % kv_heads
        or q.dim != k.dim
        or q.repeat_inner * q.repeat_outer != 1
    ):
        return Channels((), roots)
    group_inner = k.repeat_outer == 1 and v.repeat_outer == 1
    layout = _output_layout(query, tuple(out.shape), heads, v.dim)
    if layout is None or (not group_inner and (k.repeat_inner, v.repeat_inner) != (1, 1)):
        return Channels((), roots)
    source = Attention(node, heads, kv_heads, q.dim, v.dim, group_inner, roots)
    return Channels((Port(source, layout),), frozenset([source]) | roots, moved=True)


def _output_layout(query: Channels, shape: tuple[int, ...], heads: int, dim: int) -> Layout | None:
    """The layout of the mix: as the query's, with head h at stride ``dim`` and its channels at
    stride 1."""
    model = query.ports[0].layout
    if model is None or len(model.dims) != len(shape) or shape[-1] != dim:
        return None
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
    if stride != dim:
        return None
    dims[-1] = (Atom(dim, 1),)
    return Layout(0, tuple(dims))


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
    moving = [atom for atom in outer if atom.stride != 0]
    if len(moving) > 2 or any(not isinstance(atom.size, int) for atom in outer):
        return None
    groups, group_stride = 1, 0
    if len(moving) == 2:
        size, stride = int(moving[1].size), moving[1].stride or 0
        if moving[0].stride != size * stride:
            groups, group_stride = int(moving[0].size), moving[0].stride or 0
        moving = [Atom(int(moving[0].size) * size, stride)]
    head = moving[0] if moving else Atom(1, 0)
    repeats = [1, 1]
    before = True
    for atom in outer:
        if atom.stride == 0:
            repeats[1 if before and moving else 0] *= int(atom.size)
        else:
            before = False
    return Heads(
        port.source, layout.offset, int(head.size), head.stride or 0, groups, group_stride,
        inner[0].size, repeats[0], repeats[1],
    )  # fmt: skip
