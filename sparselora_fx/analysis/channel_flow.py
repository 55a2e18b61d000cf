"""Follow the channels of every site's output through a graph, forward, one rule per kind of
operation.

The result tells, for each node, which sites' channels it holds and in which layout. A node with no
value is one that no rule knows: whoever reads channels there sees all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from sparselora_fx.analysis.attention import attention_value
from sparselora_fx.analysis.channel_moves import move
from sparselora_fx.analysis.channel_values import (
    AttentionLogits,
    Channels,
    Port,
    Segments,
    Value,
    Values,
    completes_site,
    sources_of,
)
from sparselora_fx.analysis.regions import Site, Source
from sparselora_fx.graph.layout import Atom, Layout, as_size, same_shape
from sparselora_fx.graph.layout_joins import concatenate, stack
from sparselora_fx.graph.nodes import (
    argument,
    axis_argument,
    has_side_effect,
    op_name,
    reads_shape_only,
    tensor,
)
from sparselora_fx.graph.op_families import CASTS, NORMS, REDUCTIONS, RESHAPES
from sparselora_fx.graph.pointwise import is_pointwise

_COMBINATIONS = 64  # of the ports of joined pieces that are tried

# A mask or a bias that is written into scores leaves them scores: no rewrite changes their shape.
_IN_PLACE = {
    "iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "masked_fill_",
}  # fmt: skip


def propagate(graph: fx.Graph, sites: Sequence[Site]) -> Values:
    """The value of every node that holds sites' channels. Attention nodes become sources of their
    own.

    Lattice:    of a node: nothing (it holds no channel), then ports with a layout, then ports
                without one, then no ports; the roots only grow. A port is (source, layout): row
                ``layout(i)`` of the source at position i.
    Direction:  forward, once: a graph has no loops.
    Rule:       data movement maps layouts (`channel_moves`); a pointwise call unites the ports of
                its operands; norms keep them; `cat` and `stack` join layouts that continue each
                other; attention starts a source of its own; what no rule knows keeps its roots.
    Sound:      a layout is claimed only where the operation's own definition gives it. Nothing
                that was made of channels loses its roots but sizes and what writes in place, so
                `readers` sees every reader: an unknown call costs a region, never a wrong slice.
    """
    starts = {node: site for site in sites for node in (site.node, *site.more)}
    branches = {node for site in sites for node in site.adapter_nodes}
    values: Values = {}
    for node in graph.nodes:
        if node in starts:
            out = tensor(node)
            assert out is not None
            port = Port(starts[node], Layout.of_linear(out.shape))
            values[node] = Channels((port,), frozenset([starts[node]]), moved=True)
            continue
        if node in branches:
            continue  # a LoRA branch is part of its site
        sources = (source for source in node.all_input_nodes if source in values)
        if all(reads_shape_only(node, source) for source in sources):
            continue
        found = attention_value(node, values) or _transfer(node, values) or _opaque(node, values)
        if found is not None:
            values[node] = found
    return values


def _transfer(node: fx.Node, values: Values) -> Value | None:
    name = op_name(node)
    first = node.args[0] if node.args else None
    held = values.get(first) if isinstance(first, fx.Node) else None
    if name in ("cat", "concat", "concatenate", "stack"):
        pieces = [values.get(piece) for piece in node.all_input_nodes]
        scores = [piece for piece in pieces if isinstance(piece, AttentionLogits)]
        return scores[0] if len(scores) == 1 else _join(node, values)
    if isinstance(held, tuple):
        return held[node.args[1]] if name == "getitem" and isinstance(node.args[1], int) else None
    if isinstance(held, AttentionLogits):
        return held if _keeps_scores(node) else None
    if isinstance(held, Channels):
        if name == "getitem" and tensor(node.args[0]) is None:
            return held  # one result of a function that is applied channel by channel
        moved = move(node, name, held)
        if moved is not None:
            return moved
        if name in NORMS or name in ("normalize", "dropout", "rrelu"):
            return replace(held, moved=held.moved and name == "dropout")
        if name in REDUCTIONS and _keeps_dim(node):
            return Channels((), held.roots)
    return _pointwise(node, values)


def _opaque(node: fx.Node, values: Values) -> Value | None:
    """Something made from channels in a way that no rule knows: no ports, but its roots are kept,
    so that it may still end in the consumer alone."""
    made = node.meta.get("example_value")
    if has_side_effect(node):
        return None
    held = [values[source] for source in node.all_input_nodes if source in values]
    unknown = Channels((), frozenset().union(*(sources_of(value) for value in held)))
    if isinstance(made, tuple | list):
        return tuple(unknown for _ in made)
    return None if tensor(node) is None else unknown


def _keeps_dim(node: fx.Node) -> bool:
    return bool(node.kwargs.get("keepdim") or (len(node.args) > 2 and node.args[-1] is True))


def _keeps_scores(node: fx.Node) -> bool:
    name = op_name(node)
    out = tensor(node)
    if out is None or out.dim() < 3:
        return False
    return is_pointwise(node) or name in {
        "softmax", "dropout", "masked_fill", "cat", "getitem", *CASTS, *RESHAPES, *_IN_PLACE,
    }  # fmt: skip


def _pointwise(node: fx.Node, values: Values) -> Value | None:
    inputs = [values[n] for n in node.all_input_nodes if n in values]
    if not is_pointwise(node):
        return None
    if all(held == inputs[0] for held in inputs) and completes_site(node, inputs[0]):
        return inputs[0]
    scores = [value for value in inputs if isinstance(value, AttentionLogits)]
    if scores:
        return scores[0] if len(inputs) == 1 else None
    channels = [value for value in inputs if isinstance(value, Channels)]
    if len(channels) != len(inputs):
        return None
    ports = tuple(dict.fromkeys(port for value in channels for port in value.ports))
    out = tensor(node)
    if out is None:  # an applied function returns a tuple
        out = node.meta["example_value"][0]
    aligned = tuple(_align(port, out.dim()) for port in ports)
    segments = channels[0].segments if len(channels) == 1 else None
    roots = frozenset().union(*(value.roots for value in channels))
    return Channels(aligned, roots, segments=segments)


def _align(port: Port, rank: int) -> Port:
    """A port of an operand of lower rank, broadcast on the left."""
    if port.layout is None or len(port.layout.dims) == rank:
        return port
    missing = rank - len(port.layout.dims)
    return Port(port.source, replace(port.layout, dims=((),) * missing + port.layout.dims))


def _join(node: fx.Node, values: Values) -> Channels | None:
    """``cat`` and ``stack``: first ports that continue each other join; anything else becomes a
    mixed port."""
    pieces = [piece for piece in argument(node, 0, "tensors") if not _is_nothing(piece)]
    if len(pieces) == 1 and op_name(node) != "stack":
        only = values.get(pieces[0])
        return only if isinstance(only, Channels) else None
    held = [values.get(piece) for piece in pieces]
    known = [value for value in held if isinstance(value, Channels)]
    out = tensor(node)
    if out is None or len(known) != len([v for v in held if v is not None]):
        return None
    roots: frozenset[Source] = frozenset().union(*(value.roots for value in known))
    sources = dict.fromkeys(port.source for value in known for port in value.ports)
    if len(known) == 1 and op_name(node) != "stack":
        longer = _longer(node, known[0], out)
        if longer is not None:
            return longer
    axis = axis_argument(node, 1, "dim", out.dim())
    joined = _continued(known, stack if op_name(node) == "stack" else concatenate, axis)
    if joined is not None and len(known) == len(pieces):
        rest = [Port(source, None) for source in sources if source is not joined.source]
        moved = all(value.moved for value in known)
        return Channels((joined, *rest), roots, moved=moved)
    ports = tuple(Port(source, None) for source in sources)
    return Channels(ports, roots, segments=_segments(node, pieces, values))


def _continued(
    pieces: Sequence[Channels], join: Callable[[list[Layout], int], Layout | None], axis: int
) -> Port | None:
    """One port of each piece, of one source, that together make a layout. Of rotated pairs each
    piece holds both channels (``(a c - b s, a s + b c)``): there the layout runs over both."""
    found: Port | None = None
    for ports in itertools.islice(itertools.product(*(p.ports for p in pieces)), _COMBINATIONS):
        layouts = [port.layout for port in ports if port.layout is not None]
        if len(layouts) != len(ports) or len({id(port.source) for port in ports}) != 1:
            continue
        joined = join(layouts, axis)
        if joined is None:
            continue
        if any(layout.offset != layouts[0].offset for layout in layouts):
            return Port(ports[0].source, joined)
        found = found or Port(ports[0].source, joined)
    return found


def _longer(node: fx.Node, held: Channels, out: torch.Tensor) -> Channels | None:
    """More tokens, which hold no site's channels (learned keys, say), beside those of one value."""
    axis = axis_argument(node, 1, "dim", out.dim())
    layouts = [port.layout for port in held.ports]
    if not layouts or not all(one and one.is_token(axis) and one.dims[axis] for one in layouts):
        return None
    tokens = (Atom(as_size(out.shape[axis]), None),)
    ports = tuple(
        Port(port.source, replace(one, dims=(*one.dims[:axis], tokens, *one.dims[axis + 1 :])))
        for port, one in zip(held.ports, layouts, strict=True)
        if one is not None
    )
    return Channels(ports, held.roots, moved=held.moved)


def _is_nothing(piece: fx.Node) -> bool:
    """Whether ``cat`` skips a piece: a list without elements (an empty cache)."""
    example = tensor(piece)
    return example is not None and same_shape(example.shape, (0,))


def _segments(node: fx.Node, pieces: Sequence[fx.Node], values: Values) -> Segments | None:
    """The pieces of a ``cat`` side by side, where their sizes are known."""
    out = tensor(node)
    if op_name(node) == "stack" or out is None:
        return None
    axis = axis_argument(node, 1, "dim", out.dim())
    parts = []
    for piece in pieces:
        shape, held = tensor(piece), values.get(piece)
        if shape is None or not isinstance(shape.shape[axis], int):
            return None
        parts.append((shape.shape[axis], held if isinstance(held, Channels) else None))
    return Segments(axis - out.dim(), tuple(parts))
