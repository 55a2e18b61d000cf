"""What masks hold: a graph's own mask, computed for batches with padding here and there."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparselora_fx import _torch
from sparselora_fx.fx import changes_input, op_name, tensor
from sparselora_fx.layout import same_count

log = logging.getLogger(__name__)

_HIDDEN = -1e3  # scores that much lower than others have no weight: exp(-1000) is 0 in every dtype
_MOST = 1 << 28  # elements of a mask that is computed to be looked at
_LAYERS = ("linear", "matmul", "bmm", "addmm", "baddbmm", "embedding", "softmax", "site")
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass
class _Batch:
    """Which tokens are real, ``bool[B, L]``, and the inputs that say so."""

    shown: Tensor
    inputs: dict[fx.Node, Any]
    known: dict[fx.Node, Any] = field(default_factory=dict)


class MaskValues:
    """Values of the nodes that masks are made of.

    In a graph that is given an attention mask ``[B, L]``, they are computed for batches with
    padding on the left, on the right and on both sides, whatever the traced batch holds. A graph
    that is given the mask that its model has made (a block compiled by itself) shows this one
    batch's only.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], real: fx.Node | None) -> None:
        """``inputs``: those of the graph; ``real``: the one that says of each token of the traced
        batch ``[B, L]`` where it is among the real ones, -1 for padding; None: do without."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        given = dict(zip(placeholders, inputs, strict=True))
        masks = [n for n in placeholders if "attention_mask" in str(n.target) and _rank(n) == 2]
        self.outer: dict[fx.Node, Any] = {}  # inputs of a body -> what it is called with
        self.found: dict[tuple[fx.Node, fx.Node | None], bool] = {}  # answers of `hides`
        batches: list[_Batch] = []
        self.roots = set(masks or filter(_is_made, placeholders))
        if masks:
            for shown in _paddings(given[masks[0]]):
                new = {node: shown.to(given[node].dtype) for node in masks}
                batches.append(_Batch(shown, {**given, **new}))
        elif real is not None:
            batches.append(_Batch(given[real] >= 0, given))
        small = all(b.shown.shape[0] * b.shown.shape[1] ** 2 <= _MOST for b in batches)
        self.batches = batches if small else []

    def enter(self, body: fx.GraphModule, operands: Sequence[Any]) -> None:
        """From now on a body's inputs are those of one call of it."""
        self.outer |= dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for batch in self.batches:
            batch.known = {n: v for n, v in batch.known.items() if n.graph is not body.graph}
        self.found = {k: v for k, v in self.found.items() if k[0].graph is not body.graph}

    def hides(self, node: Any, scores: fx.Node | None = None) -> bool:
        """Whether a mask ``[B or 1, any, L or 1, L]`` hides padding from every real token: False,
        or a large negative number. ``scores``: an operand of the node that counts as zero."""
        while isinstance(node, fx.Node) and node in self.outer:
            node = self.outer[node]
        if not isinstance(node, fx.Node):
            return False
        if (node, scores) not in self.found:  # one mask serves the attentions of all layers
            self.found[node, scores] = self._computed_hides(node, scores)
        return self.found[node, scores]

    def _computed_hides(self, node: fx.Node, scores: fx.Node | None) -> bool:
        if not self.batches or not self._is_mask(node, scores):
            return False
        try:
            with torch.no_grad():
                masks = (self._value(node, batch, scores) for batch in self.batches)
                return all(_hides(m, b.shown) for m, b in zip(masks, self.batches, strict=True))
        except _ERRORS as error:
            log.debug("a mask cannot be computed, so padding counts as read: %s", error)
            return False

    def _is_mask(self, node: fx.Node, scores: fx.Node | None) -> bool:
        """Whether a node is made of inputs that are no weights, by operations that no layer is made
        of, with nothing changed in place."""
        todo, seen = [node], {scores}
        while todo:
            current = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            outer = self.outer.get(current)
            weight = current.op == "placeholder" and outer is None and not _is_no_weight(current)
            changed = current is not node and any(map(changes_input, (current, *current.users)))
            if weight or op_name(current) in _LAYERS or (changed and node not in current.users):
                return False
            todo += [n for n in (*current.all_input_nodes, outer) if isinstance(n, fx.Node)]
        return not self.roots.isdisjoint(seen)

    def _value(self, node: Any, batch: _Batch, scores: fx.Node | None = None) -> Any:
        if isinstance(node, torch.SymInt):
            return _torch.traced_size(node)
        if not isinstance(node, fx.Node):
            return node
        if scores is not None:
            return _called(node, lambda n: _zero(n) if n is scores else self._value(n, batch))
        if node not in batch.known:
            batch.known[node] = self._computed(node, batch)
        return batch.known[node]

    def _computed(self, node: fx.Node, batch: _Batch) -> Any:
        if node.op == "placeholder":
            given = self.outer if node in self.outer else batch.inputs
            return self._value(given[node], batch)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(node.graph.owning_module)
        return _called(node, lambda source: self._value(source, batch))


def _called(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a call returns for some values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    target = operator.add if node.target is operator.iadd else node.target
    return target(*args, **kwargs)


def _zero(scores: fx.Node) -> Tensor:
    """One zero, of as many dimensions as scores."""
    example = tensor(scores)
    assert example is not None
    return torch.zeros([1] * example.dim(), dtype=example.dtype, device=example.device)


def _hides(mask: Any, shown: Tensor) -> bool:
    """Whether a mask hides the columns of padding in the rows of real tokens."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return False
    mask = mask if mask.dim() == 4 else mask[None, None]
    samples, length = shown.shape
    sizes = ((1, samples), (1, length), (length,))
    if any(mask.shape[d] not in allowed for d, allowed in zip((0, 2, 3), sizes, strict=True)):
        return False
    hidden = ~mask if mask.dtype == torch.bool else mask <= _HIDDEN
    rows = shown[:, None, :, None] if mask.shape[2] == length else shown.new_ones(1, 1, 1, 1)
    matters = rows & ~shown[:, None, None, :]
    return bool((hidden | ~matters).all())


def _paddings(mask: Tensor) -> Iterator[Tensor]:
    """Batches with padding on the right, on the left and on both sides, more of it in some samples
    than in others; a token of each sample is real, if it has two another one is not."""
    samples, length = mask.shape
    places = torch.arange(length, device=mask.device)[None]
    parts = torch.arange(1, samples + 1, device=mask.device)[:, None]
    some = (parts * length // (2 * samples + 1)).clamp(min=1, max=max(length - 1, 0))
    left = places >= some
    right = places < length - some.flip(0)
    yield right
    yield left
    both = left & (places < length - 1)
    yield torch.where(both.any(dim=1, keepdim=True), both, left)


def _is_no_weight(node: fx.Node) -> bool:
    """Whether an input holds whole numbers, booleans, a size, or a mask that its model has made."""
    example = tensor(node)
    if example is None or not example.dtype.is_floating_point:
        return True
    return _is_made(node)


def _is_made(node: fx.Node) -> bool:
    """Whether an input may be a mask ``[B or 1, any, L, L]`` that its model has made."""
    example = tensor(node)
    if example is None or isinstance(example, torch.nn.Parameter) or example.dim() != 4:
        return False
    return same_count(example.shape[2:3], example.shape[3:])


def _rank(node: fx.Node) -> int:
    example = tensor(node)
    return -1 if example is None else example.dim()
