"""Follow the channels of every site's output through a graph, forward, one rule per kind of operation.

The result tells, for each node, which sites' channels it holds and in which layout. A node with no value is one that
no rule knows: whoever reads channels there sees all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from sparselora_fx.fx import argument, axis_argument, is_pointwise, op_name, tensor
from sparselora_fx.layout import Atom, Layout, concatenate, stack
from sparselora_fx.regions import Attention, Site, Source


@dataclass(frozen=True)
class Port:
    """Channels of one source, in one layout (None: mixed beyond what a layout can say)."""

    source: Source
    layout: Layout | None


@dataclass(frozen=True)
class Channels:
    """A tensor made from sites' outputs. ``moved`` means by data movement only, so it has one port."""

    ports: tuple[Port, ...]
    roots: frozenset[Source]
    moved: bool = False


@dataclass(frozen=True)
class Scores:
    """Attention scores or probabilities: made from queries and keys."""

    query: Channels
    key: Channels
    roots: frozenset[Source]


Value = Channels | Scores | tuple[Channels, ...]
Values = dict[fx.Node, Value]

CASTS = {
    "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach", "type",
}  # fmt: skip
RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "unsqueeze", "squeeze", "reshape_as"}
PERMUTES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "moveaxis"}
SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes"}
NORMS = {"layer_norm", "rms_norm"}
REDUCTIONS = {"mean", "sum", "var", "norm", "amax", "linalg_vector_norm", "vector_norm"}


def propagate(graph: fx.Graph, sites: Sequence[Site]) -> Values:
    """The value of every node that holds sites' channels. Attention nodes become sources of their own."""
    from sparselora_fx.attention import attention_value

    starts = {site.node: site for site in sites}
    values: Values = {}
    for node in graph.nodes:
        if node in starts:
            out = tensor(node)
            assert out is not None
            port = Port(starts[node], Layout.of_linear(out.shape))
            values[node] = Channels((port,), frozenset([starts[node]]), moved=True)
            continue
        if not any(source in values for source in node.all_input_nodes):
            continue
        found = attention_value(node, values) or _transfer(node, values)
        if found is not None:
            values[node] = found
    return values


def _transfer(node: fx.Node, values: Values) -> Value | None:
    name = op_name(node)
    first = node.args[0] if node.args else None
    held = values.get(first) if isinstance(first, fx.Node) else None
    if name in ("cat", "concat", "concatenate", "stack"):
        return _join(node, values)
    if isinstance(held, tuple):
        return held[node.args[1]] if name == "getitem" and isinstance(node.args[1], int) else None
    if isinstance(held, Scores):
        return held if _keeps_scores(node) else None
    if isinstance(held, Channels):
        moved = _move(node, name, held)
        if moved is not None:
            return moved
        if name in NORMS or name in ("normalize", "dropout"):
            return replace(held, moved=held.moved and name == "dropout")
        if name in REDUCTIONS and _keeps_dim(node):
            return Channels((), held.roots)
    return _pointwise(node, values)


def _keeps_dim(node: fx.Node) -> bool:
    return bool(node.kwargs.get("keepdim") or (len(node.args) > 2 and node.args[-1] is True))


def _keeps_scores(node: fx.Node) -> bool:
    name = op_name(node)
    out = tensor(node)
    if out is None or out.dim() < 3:
        return False
    return is_pointwise(node) or name in {
        "softmax", "dropout", "masked_fill", "cat", "getitem", *CASTS, *RESHAPES,
    }  # fmt: skip


def _pointwise(node: fx.Node, values: Values) -> Value | None:
    inputs = [values[n] for n in node.all_input_nodes if n in values]
    if not is_pointwise(node):
        return None
    if len(inputs) == 1 and adds_adapter(node, inputs[0]):
        return inputs[0]
    scores = [value for value in inputs if isinstance(value, Scores)]
    if scores:
        return scores[0] if len(inputs) == 1 else None
    channels = [value for value in inputs if isinstance(value, Channels)]
    if len(channels) != len(inputs):
        return None
    ports = tuple(dict.fromkeys(port for value in channels for port in value.ports))
    out = tensor(node)
    assert out is not None
    aligned = tuple(_align(port, out.dim()) for port in ports)
    return Channels(aligned, frozenset().union(*(value.roots for value in channels)))


def adds_adapter(node: fx.Node, value: Value) -> bool:
    """Whether a node adds a site's LoRA branch: the channels stay where they are."""
    return any(isinstance(root, Site) and node in root.adapter_adds for root in sources_of(value))


def _align(port: Port, rank: int) -> Port:
    """A port of an operand of lower rank, broadcast on the left."""
    if port.layout is None or len(port.layout.dims) == rank:
        return port
    missing = rank - len(port.layout.dims)
    return Port(port.source, replace(port.layout, dims=((),) * missing + port.layout.dims))


def _move(node: fx.Node, name: str, held: Channels) -> Value | None:
    """Data movement: map every port's layout."""
    out = tensor(node)
    if name in CASTS:
        return held
    if name in RESHAPES and out is not None:
        return _map(held, lambda layout: layout.reshape(out.shape))
    if name in PERMUTES or (name == "getattr" and node.args[1] in ("mT", "T")):
        source = tensor(node.args[0])
        assert source is not None
        order = _order(node, name, source.dim())
        return None if order is None else _map(held, lambda layout: layout.permute(order))
    if name in ("expand", "broadcast_to", "expand_as") and out is not None:
        return _map(held, lambda layout: layout.expand(out.shape))
    if name == "repeat_interleave" and isinstance(argument(node, 1, "repeats"), int):
        axis = argument(node, 2, "dim")
        repeats = argument(node, 1, "repeats")
        if axis is None or out is None:
            return None
        return _map(held, lambda layout: layout.repeat_inner(axis % out.dim(), repeats))
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


def _map(held: Channels, rule: Callable[[Layout], Layout | None]) -> Channels | None:
    ports = tuple(
        Port(port.source, rule(port.layout) if port.layout is not None else None) for port in held.ports
    )
    if held.moved and any(port.layout is None for port in ports):
        return replace(held, ports=ports, moved=False)
    return replace(held, ports=ports)


def _order(node: fx.Node, name: str, rank: int) -> list[int] | None:
    order = list(range(rank))
    if name == "permute":
        dims = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        return [int(d) % rank for d in dims]
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


def _index(layout: Layout, key: Any, shape: Sequence[Any]) -> Layout | None:
    """``x[key]`` for slices with integer steps, integers, None and Ellipsis."""
    keys = [_one_index(k) for k in (key if isinstance(key, tuple) else (key,))]
    if any(not (k is None or k is Ellipsis or isinstance(k, int | slice)) for k in keys):
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
        elif k != slice(None):
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


def _one_index(key: Any) -> Any:
    """``x[[i]]`` as the slice that it equals."""
    if isinstance(key, list) and len(key) == 1 and isinstance(key[0], int):
        return slice(key[0], key[0] + 1 or None)
    return key


def _pick(layout: Layout, axis: int, index: Any) -> Layout | None:
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
        assert part is not None
        parts.append(part)
    return tuple(parts)


def _join(node: fx.Node, values: Values) -> Channels | None:
    """``cat`` and ``stack``: first ports that continue each other join; anything else becomes a mixed port."""
    pieces = argument(node, 0, "tensors")
    held = [values.get(piece) for piece in pieces]
    known = [value for value in held if isinstance(value, Channels)]
    out = tensor(node)
    if out is None or len(known) != len([v for v in held if v is not None]):
        return None
    roots: frozenset[Source] = frozenset().union(*(value.roots for value in known))
    first_ports = [value.ports[0] for value in known if value.ports]
    layouts = [port.layout for port in first_ports]
    joined: Layout | None = None
    same = len({id(port.source) for port in first_ports}) == 1
    if same and len(first_ports) == len(pieces) and all(layouts):
        axis = axis_argument(node, 1, "dim", out.dim())
        full = [layout for layout in layouts if layout is not None]
        joined = stack(full, axis) if op_name(node) == "stack" else concatenate(full, axis)
    sources = dict.fromkeys(port.source for value in known for port in value.ports)
    if joined is not None:
        rest = [Port(source, None) for source in sources if source is not first_ports[0].source]
        moved = all(value.moved for value in known)
        return Channels((Port(first_ports[0].source, joined), *rest), roots, moved=moved)
    return Channels(tuple(Port(source, None) for source in sources), roots)


def sources_of(value: Value | None) -> frozenset[Source]:
    """Every source whose channels a value was made from."""
    if value is None:
        return frozenset()
    if isinstance(value, tuple):
        return frozenset().union(*(part.roots for part in value))
    return value.roots


def attention_of(value: Channels) -> Attention | None:
    """The one attention among a value's ports, if there is exactly one."""
    found = {port.source for port in value.ports if isinstance(port.source, Attention)}
    return found.pop() if len(found) == 1 else None  # type: ignore[return-value]


