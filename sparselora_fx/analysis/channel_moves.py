"""How operations that only move data change where channels are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from sparselora_fx.analysis.channel_values import Channels, Port, Segments, Value
from sparselora_fx.graph.indices import run_of
from sparselora_fx.graph.layout import Atom, Layout
from sparselora_fx.graph.nodes import argument, axis_argument, tensor
from sparselora_fx.graph.op_families import CASTS, PERMUTES, RESHAPES, SPLITS

_LIST = (list, fx.Node)  # an index of numbers, or of a tensor


def move(node: fx.Node, name: str, held: Channels) -> Value | None:
    """What ``node`` holds if all it does is to move what ``held`` says of its input; None: it is
    no data movement, or one that is not known.

    Lattice:    that of `channel_flow`: a layout, or None where the move is no affine map.
    Direction:  forward, one call.
    Rule:       the operation's definition on layouts (`graph.layout`), port by port. Indices count
                only where they are numbers of the graph.
    Sound:      a layout says for each position which row is there; tests compare that with the
                operation on a tensor of row numbers.
    """
    out = tensor(node)
    if name in CASTS:
        return held
    if name in RESHAPES and out is not None:
        return _map(held, lambda layout: layout.reshape(out.shape))
    if name in PERMUTES or (name == "getattr" and node.args[1] in ("mT", "T")):
        source = tensor(node.args[0])
        assert source is not None
        order = order_of(node, name, source.dim())
        return None if order is None else permuted(held, order)
    if name in ("expand", "broadcast_to", "expand_as") and out is not None:
        return _map(held, lambda layout: layout.expand(out.shape))
    if name == "repeat_interleave" and isinstance(argument(node, 1, "repeats"), int):
        axis = argument(node, 2, "dim")
        repeats = argument(node, 1, "repeats")
        if axis is None or out is None:
            return None
        return _map(held, lambda layout: layout.repeat_inner(axis % out.dim(), repeats))
    if name in ("repeat", "tile"):
        times = _numbers(node, "repeats")
        return _map(held, lambda layout: layout.repeat_outer(times))
    if name == "index_select" and out is not None:
        axis = axis_argument(node, 1, "dim", out.dim())
        return _map(held, lambda layout: _taken(layout, axis, argument(node, 2, "index")))
    if name == "getitem" and out is not None:
        return _map(held, lambda layout: _index(layout, node.args[1], out.shape))
    if name == "select" and out is not None:
        axis = axis_argument(node, 1, "dim", out.dim() + 1)
        start = argument(node, 2, "index")
        return _map(held, lambda layout: _pick(layout, axis, start))
    if name == "narrow" and out is not None:
        axis, start = axis_argument(node, 1, "dim", out.dim()), argument(node, 2, "start")
        return _map(held, lambda layout: layout.slice(axis, start, out.shape[axis]))
    if name in ("view_as_complex", "view_as_real"):
        return _map(held, _as_complex if name == "view_as_complex" else _as_real)
    if name in SPLITS:
        return _split(node, name, held)
    return None


def _as_complex(layout: Layout) -> Layout | None:
    """Pairs of channels become one complex channel (RoPE by complex multiplication)."""
    pair = layout.channel_atoms(len(layout.dims) - 1)
    return layout.drop(len(layout.dims) - 1) if pair == [Atom(2, 1)] else None


def _as_real(layout: Layout) -> Layout:
    return layout.insert(len(layout.dims), (Atom(2, 1),))


def permuted(held: Channels, order: list[int]) -> Channels:
    """What ``x.permute(order)`` holds."""
    moved = _map(held, lambda layout: layout.permute(order))
    if held.segments is None:
        return moved
    parts = [
        (n, part if part is None else permuted(part, order)) for n, part in held.segments.parts
    ]
    axis = order.index(held.segments.axis + len(order)) - len(order)
    return replace(moved, segments=Segments(axis, tuple(parts)))


def _map(held: Channels, rule: Callable[[Layout], Layout | None]) -> Channels:
    held = replace(held, segments=None)
    ports = tuple(
        Port(port.source, rule(port.layout) if port.layout is not None else None)
        for port in held.ports
    )
    if held.moved and any(port.layout is None for port in ports):
        return replace(held, ports=ports, moved=False)
    return replace(held, ports=ports)


def _numbers(node: fx.Node, name: str) -> tuple[int, ...]:
    """Numbers that a call takes one by one, as one number or as a sequence."""
    if len(node.args) > 2:
        return tuple(argument(node, i, name) for i in range(1, len(node.args)))
    given = argument(node, 1, name)
    return (given,) if isinstance(given, int) else tuple(given or ())


def order_of(node: fx.Node, name: str, rank: int) -> list[int] | None:
    """Which axis of its input each axis of a permuted value is; None if the call does not say."""
    order = list(range(rank))
    if name == "permute":
        return [d % rank for d in _numbers(node, "dims")]
    if name in ("movedim", "moveaxis"):
        source, target = argument(node, 1, "source"), argument(node, 2, "destination")
        if not (isinstance(source, int) and isinstance(target, int)):
            return None
        order.insert(target % rank, order.pop(source % rank))
        return order
    if name in ("t", "getattr"):
        a, b = rank - 2, rank - 1
        if rank < 2:
            return None
    else:
        a, b = axis_argument(node, 1, "dim0", rank), axis_argument(node, 2, "dim1", rank)
    order[a], order[b] = order[b], order[a]
    return order


def _index(layout: Layout, key: object, shape: Sequence[object]) -> Layout | None:
    """``x[key]`` for slices with integer steps, integers, None and Ellipsis."""
    keys = [_one_index(k) for k in (key if isinstance(key, tuple) else (key,))]
    if any(not (k is None or k is Ellipsis or isinstance(k, (int, slice, *_LIST))) for k in keys):
        return None
    if sum(isinstance(k, _LIST) for k in keys) > 1:
        return None
    consumed = sum(1 for k in keys if k is not None and k is not Ellipsis)
    rest = [slice(None)] * (len(layout.dims) - consumed)
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys = keys[:at] + rest + keys[at + 1 :]
    axis, current = 0, layout
    for k in keys:
        if k is None:
            current = current.insert(axis)
        elif isinstance(k, int):
            picked = _pick(current, axis, k)
            if picked is None:
                return None
            current, axis = picked, axis - 1
        elif isinstance(k, _LIST):
            taken = _taken(current, axis, k)
            if taken is None or any(isinstance(other, int) for other in keys):
                return None
            current = taken
        elif isinstance(k, slice) and k != slice(None):
            start, step = k.start or 0, k.step or 1
            size = _static_size(current, axis)
            if not isinstance(start, int) or not isinstance(step, int) or step < 1:
                return None
            if start < 0:
                if size is None:
                    return None
                start += size
            sliced = current.slice(axis, start, shape[axis], step)
            if sliced is None:
                return None
            current = sliced
        axis += 1
    return current


def _one_index(key: object) -> object:
    """``x[[i]]`` as the slice that it equals."""
    if isinstance(key, list) and len(key) == 1 and isinstance(key[0], int):
        return slice(key[0], key[0] + 1 or None)
    return key


def _taken(layout: Layout, axis: int, index: object) -> Layout | None:
    """``index_select(axis, index)`` for an index of numbers."""
    found = run_of(index)
    return None if found is None else layout.take(axis, *found)


def _pick(layout: Layout, axis: int, index: object) -> Layout | None:
    if not isinstance(index, int):
        return None
    size = _static_size(layout, axis)
    if index < 0:
        if size is None:
            return None
        index += size
    sliced = layout.slice(axis, index, 1)
    return None if sliced is None else sliced.drop(axis)


def _static_size(layout: Layout, axis: int) -> int | None:
    total = 1
    for atom in layout.dims[axis]:
        if not isinstance(atom.size, int):
            return None
        total *= atom.size
    return total


def _split(node: fx.Node, name: str, held: Channels) -> tuple[Channels, ...] | None:
    pieces = node.meta.get("example_value")
    source = tensor(node.args[0])
    if not isinstance(pieces, tuple | list) or source is None:
        return None
    position = 1 if name == "unbind" else 2
    axis = axis_argument(node, position, "dim", source.dim())
    parts: list[Channels] = []
    start = 0
    for piece in pieces:
        if name == "unbind":
            part = _map(held, lambda layout, at=start: _pick(layout, axis, at))  # type: ignore[misc]
            start += 1
        else:
            size = piece.shape[axis]
            if not isinstance(size, int):
                return None
            part = _map(held, lambda layout, at=start, n=size: layout.slice(axis, at, n))  # type: ignore[misc]
            start += size
        parts.append(part)
    return tuple(parts)
