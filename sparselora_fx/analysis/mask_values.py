"""Values that a graph computes of its inputs alone, for batches with padding here and there: masks,
position biases, scales."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sparselora_fx import _torch
from sparselora_fx.graph.nodes import called, changes_input, op_name, value

_MOST = 1 << 28  # elements of a mask that is computed to be looked at
LAYERS = (
    "linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "embedding", "softmax",
    "layer_norm", "rms_norm", "scaled_dot_product_attention", "site",
)  # fmt: skip


@dataclass
class _Batch:
    """Which tokens are real, ``bool[B, L]``, and the inputs that say so."""

    shown: Tensor
    inputs: dict[fx.Node, object]
    known: dict[fx.Node, object] = field(default_factory=dict)


class MaskValues:
    """Values of the nodes that masks are made of.

    They are computed for batches with padding on the left, on the right, on both sides and inside,
    whatever the traced batch holds; buffers and whole numbers are what they are in that batch.

    Lattice:    of a node: known (one value for each of the batches), or not.
    Direction:  backward from a mask to the inputs it is made of (`is_known`), then forward: the
                graph's own operations are run.
    Rule:       known is what is made of inputs that are neither weights nor the caller's numbers,
                by operations of which no layer is made, with nothing changed in place on the way.
    Sound:      values are computed, not inferred. That a mask does for every padding what it does
                for these four is an assumption, and the only one.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[object], arguments: Mapping[str, Tensor]
    ) -> None:
        """``inputs``: those of the graph; ``arguments``: the tensors of the model's call by name,
        of which ``attention_mask[B, L]`` says which tokens are real."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        given = dict(zip(placeholders, inputs, strict=True))
        mask = arguments.get("attention_mask")
        masks = [n for n in placeholders if mask is not None and given[n] is mask]
        self.outer: dict[fx.Node, object] = {}  # inputs of a body -> what it is called with
        self.fixed: dict[fx.Node, bool] = {}  # answers of `is_known`
        # What a caller passes as numbers is another in the next batch.
        passed = {id(t) for t in arguments.values() if t.dtype.is_floating_point}
        self.open = {n for n in placeholders if id(given[n]) in passed and n not in masks}
        self.batches: list[_Batch] = []
        if masks and mask is not None and mask.dim() == 2:
            for shown in _paddings(mask):
                new = {node: shown.to(mask.dtype) for node in masks}
                self.batches.append(_Batch(shown, {**given, **new}))
        if any(b.shown.shape[0] * b.shown.shape[1] ** 2 > _MOST for b in self.batches):
            self.batches = []

    def enter(self, body: fx.GraphModule, operands: Sequence[object]) -> None:
        """From now on a body's inputs are those of one call of it."""
        self.outer |= dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for batch in self.batches:
            batch.known = {n: v for n, v in batch.known.items() if n.graph is not body.graph}
        self.fixed = {n: v for n, v in self.fixed.items() if n.graph is not body.graph}

    def source(self, node: object) -> object:
        """A node, or for an input of a body what it is called with."""
        while isinstance(node, fx.Node) and node in self.outer:
            node = self.outer[node]
        return node

    def is_known(self, node: object) -> bool:
        """Whether a node is made of inputs that are no weights, by operations that no layer is made
        of, with nothing changed in place."""
        node = self.source(node)
        if not isinstance(node, fx.Node):
            return True
        if node not in self.fixed:
            self.fixed[node] = self._is_known(node)
        return self.fixed[node]

    def _is_known(self, node: fx.Node) -> bool:
        todo, seen = [node], set()
        while todo:
            current = self.source(todo.pop())
            if not isinstance(current, fx.Node) or current in seen or _is_size(current):
                continue
            seen.add(current)
            changed = current is not node and any(map(changes_input, (current, *current.users)))
            if (
                current in self.open
                or is_weight(current)
                or op_name(current) in LAYERS
                or (changed and node not in current.users)
            ):
                return False
            todo += current.all_input_nodes
        return True

    def values(self, node: object) -> list[object]:
        """What a node that `is_known` holds, for each batch."""
        return [self._value(self.source(node), batch) for batch in self.batches]

    def _value(self, node: object, batch: _Batch) -> object:
        node = self.source(node)
        if isinstance(node, torch.SymInt):
            return _torch.traced_size(node)
        if not isinstance(node, fx.Node):
            return node
        if _is_size(node):
            return _torch.traced_size(value(node))
        if node not in batch.known:
            batch.known[node] = self._computed(node, batch)
        return batch.known[node]

    def _computed(self, node: fx.Node, batch: _Batch) -> object:
        if node.op == "placeholder":
            return self._value(batch.inputs[node], batch)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(node.graph.owning_module)
        return computed(node, lambda source: self._value(source, batch))


def computed(node: fx.Node, value_of: Callable[[fx.Node], object]) -> object:
    """What a call returns for some values of its arguments, none of which it changes."""
    return called(node, value_of, operator.add if node.target is operator.iadd else None)


def is_weight(node: fx.Node) -> bool:
    """Whether an input holds a parameter, frozen or not."""
    return node.op == "placeholder" and isinstance(value(node), torch.nn.Parameter)


def _is_size(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def _paddings(mask: Tensor) -> Iterator[Tensor]:
    """Batches with padding on the right, on the left, on both sides and inside, more of it in some
    samples than in others; a token of each sample is real, if it has two another one is not."""
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
    inside = (places + parts) % 3 != 0
    yield torch.where(inside.any(dim=1, keepdim=True) & ~inside.all(1, keepdim=True), inside, right)
