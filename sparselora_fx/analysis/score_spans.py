"""Between which numbers the scores of an attention lie, column by column, once masks are in them:
interval arithmetic over the operations between ``q @ k^T`` and its softmax, in any order."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from sparselora_fx.analysis.mask_values import LAYERS, MaskValues, computed, is_weight
from sparselora_fx.graph.nodes import argument, changes_input, op_name, reads_shape_only, tensor
from sparselora_fx.graph.op_families import CASTS, PERMUTES, RESHAPES, SPLITS
from sparselora_fx.graph.pointwise import is_pointwise

log = logging.getLogger(__name__)

_LAYER = 4e3  # what layers return, scores among it, is taken to lie within +- this
_SMALL = 64.0  # a known bias within +- this is a part of such scores
_GAP = 800.0  # a score that much lower than another has no weight: exp(-800) is 0 in every dtype
_MOVES = CASTS | PERMUTES | RESHAPES | SPLITS | {
    "getitem", "gather", "index_select", "expand", "repeat", "roll", "cat", "stack", "narrow",
}  # fmt: skip
_SHIFTS = ("add", "__add__", "__radd__", "iadd", "sub", "__sub__")
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
Ends = tuple[Tensor, Tensor]  # the least and the largest of a value


@dataclass(frozen=True, eq=False, repr=False)
class Span:
    """Bounds of a tensor for each batch, in a shape that broadcasts to the tensor's."""

    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]

    @property
    def alike(self) -> bool:
        """Whether all places have the same bounds."""
        return all(t.numel() == 1 for t in self.low)


class ScoreSpans:
    """Spans of the nodes of a graph and its bodies; None where none can be told.

    Lattice:    intervals for each place and batch of `MaskValues`; above them None: any number.
    Direction:  backward from a softmax's input to masks and layers, each node once.
    Rule:       masks are their values, layers return +- `_LAYER`; a pointwise call is tried at its
                operands' ends and middle; moves keep bounds that are alike everywhere.
    Sound:      for monotone calls and scores within +- `_LAYER`; what has no rule is None.
    """

    def __init__(self, masks: MaskValues) -> None:
        self.masks = masks
        self.done: dict[fx.Node, Span | None] = {}
        self.calls: dict[Hashable, Span | None] = {}  # one mask serves the attentions of all layers
        self.answers: dict[Span, bool] = {}
        self.layers: dict[Hashable, Span] = {}
        self.known: list[Span] = []  # kept, as `calls` knows spans by their identity

    def enter(self, body: fx.GraphModule, operands: list[object]) -> None:
        """From now on a body's inputs are those of one call of it."""
        self.masks.enter(body, operands)
        self.done = {n: s for n, s in self.done.items() if n.graph is not body.graph}

    def hide(self, scores: object) -> bool:
        """Whether a softmax of scores ``[B, any, L, L]`` gives no weight to padding in any row of a
        real token: each such row has a score of a real token that is far larger."""
        span = self._safely(lambda: self._of(scores))
        return span is not None and self._apart(span)

    def hide_with(self, mask: object) -> bool:
        """As `hide`, of the scores of a fused attention with a mask ``[B or 1, any, L or 1, L]``:
        added, or false where scores do not count."""
        span = self._safely(lambda: self._masked(mask))
        return span is not None and self._apart(span)

    def _safely(self, compute: Callable[[], Span | None]) -> Span | None:
        if not self.masks.batches:
            return None
        try:
            with torch.no_grad():
                return compute()
        except _ERRORS as error:
            log.debug("a mask cannot be computed, so padding counts as read: %s", error)
            return None

    def _apart(self, span: Span) -> bool:
        if span not in self.answers:
            shown = (batch.shown for batch in self.masks.batches)
            self.answers[span] = all(map(_are_apart, span.low, span.high, shown))
        return self.answers[span]

    def _masked(self, mask: object) -> Span | None:
        span = self._of(mask)
        key = ("masked", span)
        if span is not None and key not in self.calls:
            self.calls[key] = self._under(span)
        return self.calls.get(key)

    def _under(self, span: Span) -> Span:
        ends: list[tuple[Tensor, ...]] = []
        for bounds, end in ((span.low, -_LAYER), (span.high, _LAYER)):
            none = -torch.inf
            ends.append(tuple(
                torch.where(m, end, none) if m.dtype == torch.bool else m + end for m in bounds
            ))  # fmt: skip
        return Span(*ends)

    def _of(self, node: object) -> Span | None:
        node = self.masks.source(node)
        if not isinstance(node, fx.Node):
            return None
        if node not in self.done:
            self.done[node] = self._computed(node)
        return self.done[node]

    def _computed(self, node: fx.Node) -> Span | None:
        name, example = op_name(node), tensor(node)
        if example is None:
            return None
        if self.masks.is_known(node):
            known = tuple(v for v in self.masks.values(node) if isinstance(v, Tensor))
            if len(known) != len(self.masks.batches):
                return None
            self.known.append(Span(known, known))
            return self.known[-1]
        if _is_changed(node):
            return None
        if name == "baddbmm":
            return self._joined(node, [argument(node, 0, "input")], name)
        if is_weight(node) or name in LAYERS:
            return self._layer(example)
        held = node.args[0] if node.args else None
        if name in ("cat", "concat") and _along_last(node):
            # More columns behind those of the keys take weight away from all.
            return self._of(held[0]) if isinstance(held, tuple | list) else None
        if name in _SHIFTS and len(node.args) == 2 and _is_a_row(node.args[1], example):
            return self._shifted(node)
        if name in _MOVES:
            return self._moved(node, example)
        if not is_pointwise(node):
            return None
        return self._joined(node, node.all_input_nodes, name)

    def _layer(self, example: Tensor) -> Span:
        key = (example.dim(), example.dtype, example.device)
        if key not in self.layers:
            end = torch.full([1] * example.dim(), _LAYER).to(example.device, example.dtype)
            batches = len(self.masks.batches)
            self.layers[key] = Span((-end,) * batches, (end,) * batches)
        return self.layers[key]

    def _shifted(self, node: fx.Node) -> Span | None:
        """Scores and one number a row, which no softmax sees."""
        other = node.args[1]
        if self.masks.is_known(other) or not isinstance(node.args[0], fx.Node):
            return self._joined(node, node.all_input_nodes, op_name(node))
        return self._of(node.args[0])

    def _moved(self, node: fx.Node, example: Tensor) -> Span | None:
        """Values in other places, or in another dtype."""
        sources = [n for n in node.all_input_nodes if not reads_shape_only(node, n)]
        if op_name(node) in CASTS and len(sources) == 1:
            return self._joined(node, sources, op_name(node))
        numbers = [n for n in sources if _is_number(n)]
        spans = [self._of(n) for n in numbers]
        first = spans[0] if spans else None
        if first is None or any(s is None or not s.alike for s in spans) or len(set(spans)) > 1:
            return None
        shape = [1] * example.dim()
        low, high = (tuple(t.reshape(shape) for t in ends) for ends in (first.low, first.high))
        return Span(low, high)

    def _joined(self, node: fx.Node, sources: list[fx.Node], name: str) -> Span | None:
        """What an operation, place by place, makes of spans."""
        spans: dict[fx.Node, Span | None] = {}
        for source in sources:
            if reads_shape_only(node, source) or tensor(source) is None:
                continue
            spans[source] = self._of(source)
        if any(span is None for span in spans.values()):
            return None
        found = {source: span for source, span in spans.items() if span is not None}
        if name in (*_SHIFTS, "baddbmm"):
            found = {n: self._small(n, span) for n, span in found.items()}
        key = (node.op, node.target, _key_of(node, found))
        if key not in self.calls:
            self.calls[key] = self._call(node, found)
        return self.calls[key]

    def _small(self, node: fx.Node, span: Span) -> Span:
        example = tensor(node)
        assert example is not None
        exact = all(map(operator.is_, span.low, span.high))
        small = exact and example.dtype.is_floating_point
        if small and all(bool((t.abs() <= _SMALL).all()) for t in span.low):
            return self._layer(example)
        return span

    def _call(self, node: fx.Node, spans: dict[fx.Node, Span]) -> Span | None:
        lows, highs = [], []
        for i in range(len(self.masks.batches)):
            ends = _bounds(node, {n: (s.low[i], s.high[i]) for n, s in spans.items()})
            if ends is None:
                return None
            lows.append(ends[0])
            highs.append(ends[1])
        return Span(tuple(lows), tuple(highs))


def _key_of(node: fx.Node, spans: dict[fx.Node, Span]) -> str:
    """A key for a call's arguments: nodes and spans by identity, the rest by value."""
    return repr(fx.map_arg((node.args, node.kwargs), lambda n: f"@{id(spans.get(n, n))}"))


def _bounds(node: fx.Node, ends: dict[fx.Node, Ends]) -> Ends | None:
    """The least and the largest of what a call returns, between the bounds of its inputs."""
    points = {n: [lo] if lo is hi else [lo, lo / 2 + hi / 2, hi] for n, (lo, hi) in ends.items()}
    if op_name(node) == "baddbmm":
        return _of_product(node, ends)
    found: list[Tensor] = []
    for choice in itertools.product(*points.values()):
        chosen = dict(zip(points, choice, strict=True))
        if not isinstance(made := computed(node, partial(_operand, chosen)), Tensor):
            raise TypeError(f"{node} makes no tensor")
        found.append(made)
    low = high = found[0]
    for other in found[1:]:
        if other.dtype == torch.bool:
            return None
        low, high = torch.minimum(low, other), torch.maximum(high, other)
    return low, high


def _of_product(node: fx.Node, ends: dict[fx.Node, Ends]) -> Ends:
    """``beta * bias + alpha * (a @ b)``."""
    beta = argument(node, 3, "beta", 1)
    ((low, high),) = ends.values()
    low, high = sorted((low * beta, high * beta), key=lambda t: float(t.flatten()[0]))
    return low - _LAYER, high + _LAYER


def _operand(chosen: dict[fx.Node, Tensor], node: fx.Node) -> Tensor:
    if node in chosen:
        return chosen[node]
    example = tensor(node)
    if example is None:
        raise TypeError(f"{node} is no tensor")
    return torch.empty(0, dtype=example.dtype, device=example.device)  # read for its dtype alone


def _is_changed(node: fx.Node) -> bool:
    """Whether a call writes into its input, or another one into its result; adding a mask in place
    to what nothing else reads is as good as adding it."""
    readers = [user for user in node.users if not reads_shape_only(user, node)]
    writers = [user for user in readers if changes_input(user)]
    alone = len(readers) == 1 and op_name(readers[0]) == "iadd"
    return (bool(writers) and not alone) or (changes_input(node) and op_name(node) != "iadd")


def _is_number(node: fx.Node) -> bool:
    example = tensor(node)
    return example is not None and example.dtype.is_floating_point


def _is_a_row(node: object, scores: Tensor) -> bool:
    """Whether a node holds one number for each row of scores."""
    held = tensor(node)
    return held is not None and held.dim() == scores.dim() and held.shape[-1] == 1


def _along_last(node: fx.Node) -> bool:
    example, dim = tensor(node), argument(node, 1, "dim", 0)
    return example is not None and dim % example.dim() == example.dim() - 1


def _are_apart(low: Tensor, high: Tensor, shown: Tensor) -> bool:
    """Whether in each row of a real token the score of some real one is far above those of
    padding."""
    if low.dim() not in (2, 4) or low.dtype == torch.bool:
        return False
    shape = torch.broadcast_shapes(low.shape, high.shape)
    low, high = (
        t.expand(shape) if t.dim() == 4 else t.expand(shape)[None, None] for t in (low, high)
    )
    samples, length = shown.shape
    sizes = ((1, samples), (1, length), (length,))
    if any(low.shape[d] not in allowed for d, allowed in zip((0, 2, 3), sizes, strict=True)):
        return False
    columns = shown[:, None, None, :]
    real = low.masked_fill(~columns, -torch.inf).amax(-1)
    hidden = high.masked_fill(columns, -torch.inf).amax(-1)
    rows = shown[:, None, :] if low.shape[2] == length else shown.new_ones(1, 1, 1)
    far = real.double() - hidden.double() >= _GAP
    return bool((far | ~rows).all())
