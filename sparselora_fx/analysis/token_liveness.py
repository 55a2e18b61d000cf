"""Which rows of a graph's values are read: those of every token, or those of one list alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import fx

from sparselora_fx.analysis.channel_moves import order_of
from sparselora_fx.graph.layout import same_count, same_shape
from sparselora_fx.graph.nodes import (
    argument,
    axis_argument,
    changes_input,
    op_name,
    operand,
    reads_shape_only,
    tensor,
)
from sparselora_fx.graph.op_families import CASTS, NORMS, PERMUTES, REDUCTIONS, RESHAPES
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.ops import MARKERS, OPS

_TOKEN_GATHERS = (OPS.gather_tokens.default, OPS.gather_or_zero_tokens.default)
ATTENTION = "scaled_dot_product_attention"
MATMULS = ("matmul", "bmm", "baddbmm")
EXPANDS = ("expand", "broadcast_to", "expand_as")
_UPDATES = ("iadd", "isub", "imul", "add_", "sub_", "mul_")
_TUPLES = ("autograd_function_apply", "max", "min", "topk", "sort")  # results alike in shape
_SPLITS = ("chunk", "split", "tensor_split", "split_with_sizes")

Lists = tuple[fx.Node | str, ...]  # the (idx, pos) nodes of one token list, or what it is called


class LiveRows(NamedTuple):
    """The axes of samples and of their tokens (the same one, of flattened tokens), and the only
    list whose rows matter along them. A sample axis may hold several heads of each sample."""

    batch: int
    axis: int
    lists: Lists


Rows = dict[fx.Node, LiveRows]
End = Callable[[fx.Node, fx.Node, Rows], LiveRows | None]
DEAD = LiveRows(-1, -1, ())  # what a user needs whose result reaches nothing that matters


def read_rows(graph: fx.Graph, end: End) -> Rows:
    """The nodes of which only the rows of one token list can reach the graph's outputs, or nothing.

    ``end(user, node, rows)`` says what a user needs of a node by itself, as a `gather_tokens` does;
    None: that follows from what is needed of the user. The rows of later nodes are known.

    Lattice:    `DEAD` (nothing is read), then the rows of one list along given axes, then no entry:
                all rows.
    Direction:  backward, once: every user comes before what it reads.
    Rule:       what a node must have is what its readers need of it, if they agree, else all; a
                reader needs place i of its operand where place i alone makes place i of its result
                (`needed`, one rule for each kind of operation).
    Sound:      an operation without a rule needs all rows, and so does what is written in place,
                but for updates that nothing else sees. Readers of a shape alone read no row.
    """
    rows: Rows = {}
    for node in reversed(graph.nodes):
        if node.op in ("get_attr", "output"):
            continue
        live = [user for user in node.users if rows.get(user) != DEAD]
        readers = [user for user in live if not reads_shape_only(user, node)]
        need = common(end(user, node, rows) or needed(user, node, rows) for user in readers)
        unread = len(readers) == len(live) and not changes_input(node)
        if need is not None and (need != DEAD or unread):
            rows[node] = need
    return rows


def common(needs: Iterable[LiveRows | None]) -> LiveRows | None:
    """What satisfies several needs; None: all rows."""
    found = set(needs) - {DEAD}
    return DEAD if not found else found.pop() if len(found) == 1 else None


def gathered_by(user: fx.Node, node: fx.Node, rows: Rows) -> LiveRows | None:
    """What a `gather_tokens` needs of its input ``[B, L, N]`` or ``[B * L, N]``."""
    x = tensor(node)
    gathers = (
        user.target in _TOKEN_GATHERS
        and user.args[0] is node
        and x is not None
        and x.dim() in (2, 3)
    )
    if not gathers or x is None:
        return None
    return LiveRows(0, x.dim() - 2, (operand(user, 1), operand(user, 2)))


def needed(user: fx.Node, node: fx.Node, rows: Rows) -> LiveRows | None:
    """The rows of a node that a user of it needs, by what is needed of the user; None: all, or
    unknown."""
    if user not in rows or (changes_input(user) and not _updates_only(user)):
        return None
    if op_name(user) in MARKERS:
        return rows[user] if user.args[0] is node else DEAD
    need = rows[user]
    x, out = tensor(node), tensor(user)
    if x is None:  # one of several results
        known = op_name(node) in (*_SPLITS, *_TUPLES) and op_name(user) == "getitem"
        return need if known else None
    if op_name(user) in _TUPLES:
        out = out if out is not None else tensor(next(iter(user.users)))
    if op_name(user) in _SPLITS:
        along = axis_argument(user, 2, "dim", x.dim())
        return None if along in (need.batch, need.axis) else need
    if out is None:
        return None
    if op_name(user) in RESHAPES:
        return _before_reshape(x, out, need)
    axis, batch = (_source_axis(user, node, x, out, a) for a in (need.axis, need.batch))
    return None if axis is None or batch is None else LiveRows(batch, axis, need.lists)


def _source_axis(
    user: fx.Node, node: fx.Node, x: torch.Tensor, out: torch.Tensor, axis: int
) -> int | None:
    """The axis of x along which place i alone makes place i of ``out`` along ``axis``; None if
    there is none."""
    name, rank = op_name(user), out.dim()
    if name in PERMUTES or (name == "getattr" and user.args[1] == "mT"):
        order = order_of(user, name, x.dim())
        return None if order is None else order[axis]
    if name == "getitem":
        return _before_index(user, x, axis)
    if name == "stack":
        new = axis_argument(user, 1, "dim", rank)
        return None if new == axis else axis - (new < axis)
    if name in REDUCTIONS or (name in ("max", "min") and isinstance(argument(user, 1, "dim"), int)):
        return _before_reduction(user, x, axis)
    if x.dim() != rank or not same_shape(x.shape[axis : axis + 1], out.shape[axis : axis + 1]):
        return None
    keeps = (
        name in CASTS
        or name in EXPANDS
        or name in ("repeat", "tile")
        or (name == "topk" and axis_argument(user, 2, "dim", rank, -1) != axis)
        or (name == "sort" and axis_argument(user, 1, "dim", rank, -1) != axis)
        or (name == "repeat_interleave" and argument(user, 2, "dim") is not None)
        or (name in ("cat", "concat") and axis_argument(user, 1, "dim", rank) != axis)
        or (name == "softmax" and _is_other(argument(user, 1, "dim"), axis, rank))
        or (name in NORMS and rank - len(argument(user, 1, "normalized_shape")) > axis)
        or (name == "linear" and _is_only(user, node, "input") and axis < rank - 1)
        or (name == "addmm" and _is_only(user, node, "mat1", place=1) and axis == 0)
        or (name in MATMULS and (axis < rank - 2 or _is_first(user, node)) and axis < rank - 1)
        or (name == ATTENTION and _is_only(user, node, "query") and axis < rank - 1)
        or name == "dropout"
        or name in _UPDATES
        or is_pointwise(user)
    )
    return axis if keeps else None


def factors(product: fx.Node) -> tuple[object, object]:
    """The operands ``(a, b)`` of ``a @ b``, one of `MATMULS`."""
    if op_name(product) == "baddbmm":
        return argument(product, 1, "batch1"), argument(product, 2, "batch2")
    other = argument(product, 1, "mat2", product.kwargs.get("other"))
    return argument(product, 0, "input"), other


def _is_first(product: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the first factor of a product, and not the second too."""
    first, second = factors(product)
    return node is first and node is not second


def _is_other(dim: object, axis: int, rank: int) -> bool:
    """Whether a dimension is given, and is not an axis."""
    return isinstance(dim, int) and dim % rank != axis


def _before_reshape(x: torch.Tensor, out: torch.Tensor, need: LiveRows) -> LiveRows | None:
    """Where samples and tokens were before a reshape."""
    batch, axis, lists = need
    flat = batch == axis == 0
    if flat and x.dim() > 1 and same_count(x.shape[:2], out.shape[:1]):
        return LiveRows(0, 1, lists)
    if (batch, axis) == (0, 1) and same_count(x.shape[:1], out.shape[:2]):
        return LiveRows(0, 0, lists)
    source = _same_place(x, out, axis)
    if source is None or flat:
        return None if source is None else LiveRows(source, source, lists)
    samples = _same_place(x, out, batch)
    if samples is None and batch == 0 and same_count(x.shape[:source], out.shape[:axis]):
        samples = 0  # heads become a part of the samples' axis, or have been one
    return None if samples is None else LiveRows(samples, source, lists)


def _same_place(x: torch.Tensor, out: torch.Tensor, axis: int) -> int | None:
    """The axis of x that is an axis of its reshape: nothing before it changes, or nothing after."""
    lead, tail = axis + 1, out.dim() - axis - 1
    if x.dim() >= lead and same_shape(x.shape[:lead], out.shape[:lead]):
        return axis
    source = x.dim() - tail - 1
    kept = source >= 0 and same_shape(x.shape[source:], out.shape[axis:])
    return source if kept else None


def _before_index(user: fx.Node, x: torch.Tensor, axis: int) -> int | None:
    """Where the token axis was before ``x[key]``, if the key leaves its places as they are."""
    key = user.args[1]
    keys: list[object] = list(key) if isinstance(key, tuple) else [key]
    kinds = [
        list if isinstance(k, list) else type(k)
        for k in keys
        if k is not None and k is not Ellipsis
    ]
    if not {*kinds} <= {slice, int} and not ({*kinds} <= {slice, list} and kinds.count(list) == 1):
        return None
    spare = x.dim() - len(kinds)
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys = [*keys[:at], *[slice(None)] * spare, *keys[at + 1 :]]
    sources = itertools.count()
    places = [None if k is None else (next(sources), k) for k in keys]
    kept = [place for place in places if place is None or type(place[1]) is not int]
    found = kept[axis]
    if found is None:
        return None
    source, chosen = found
    if not isinstance(chosen, slice):
        return None
    return source if chosen.start in (None, 0) and chosen.step in (None, 1) else None


def _before_reduction(user: fx.Node, x: torch.Tensor, axis: int) -> int | None:
    """Where the token axis was before a reduction over given dimensions, which are others."""
    place = 2 if "norm" in op_name(user) else 1
    dim = argument(user, place, "dim")
    dims = list(dim) if isinstance(dim, tuple | list) else [dim]
    if not dims or not all(isinstance(d, int) for d in dims):
        return None
    reduced = {d % x.dim() for d in dims}
    if argument(user, place + 1, "keepdim", False):
        return None if axis in reduced else axis
    return [d for d in range(x.dim()) if d not in reduced][axis]


def _updates_only(user: fx.Node) -> bool:
    """Whether a call changes, element by element, a value that nothing else reads, under whatever
    name."""
    node = user.args[0] if op_name(user) in _UPDATES else None
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if op_name(node) not in (*CASTS, *RESHAPES, *PERMUTES, "getitem", "dropout"):
            return node.op in ("call_function", "call_method") and tensor(node) is not None
        node = node.args[0]
    return False


def _is_only(user: fx.Node, node: fx.Node, name: str, place: int = 0) -> bool:
    """Whether a node is one argument of a call and none of the others."""
    others = [*user.args[:place], *user.args[place + 1 :]]
    others += [v for k, v in user.kwargs.items() if k != name]
    return argument(user, place, name) is node and node not in others
