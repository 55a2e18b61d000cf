"""Losses that graphs compute from the batch's labels."""

from __future__ import annotations

from torch import fx

from sparselora_fx.graph.mutation import is_mutated
from sparselora_fx.graph.nodes import argument, op_name, operand, tensor
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.ir.token_lists import IGNORED

RESHAPES = ("view", "reshape", "flatten")


def ignores_unlabelled(loss: fx.Node) -> bool:
    """Whether a node is a cross entropy in which rows without a label have no part."""
    return (
        op_name(loss) == "cross_entropy" and argument(loss, 4, "ignore_index", IGNORED) == IGNORED
    )


def shown_conventions(graph: fx.Graph) -> set[bool]:
    """How the cross entropies of a graph read the batch's labels ``[B, L]``: True, row t with label
    t + 1; False, row t with label t. Empty where there is none to be seen."""
    losses = [node for node in graph.nodes if ignores_unlabelled(node)]
    found = [labels_of(argument(loss, 1, "target")) for loss in losses]
    return {shift for labels, shift, _ in filter(None, found) if _is_labels(labels)}


def _is_labels(node: fx.Node) -> bool:
    """Whether a node is the input of a call that is named labels, one for each token."""
    name, example = str(node.target), tensor(node)
    named = node.op == "placeholder" and "labels" in name and "shift_labels" not in name
    return named and example is not None and example.dim() == 2


def labels_of(target: object) -> tuple[fx.Node, bool, bool] | None:
    """The labels ``[B, L]`` that a loss's targets are, row by row; whether row t is label t + 1;
    and whether there is a row for every token. None for anything else, and for labels that the
    graph writes into.

        labels.view(-1)                                  row t is label t
        pad(labels, (0, 1), value=-100)[..., 1:]         row t is label t + 1
        labels[..., 1:]                                  the same, without a row for the last token

    Rule:   backward through reshapes, casts, one slice from 1 and one pad with the ignored label.
    Sound:  each of these moves labels row by row, and none is written into: row t of the targets is
            the label that is said, whatever the labels are.
    """
    found = _labels_of(target)
    while found is not None and isinstance(target, fx.Node):
        if is_mutated(target):
            return None
        target = target.args[0] if target is not found[0] else None
    return found


def _labels_of(target: object) -> tuple[fx.Node, bool, bool] | None:
    example = tensor(target)
    if example is None or example.dim() != 1 or example.dtype.is_floating_point:
        return None
    assert isinstance(target, fx.Node)
    node = _unwrapped(target)
    if op_name(node) != "getitem":
        return node, False, True
    if node.args[1] not in ((Ellipsis, slice(1, None, None)), (slice(None), slice(1, None, None))):
        return None
    shifted = operand(node)
    if op_name(shifted) != "pad":
        return _unwrapped(shifted), True, False
    by = argument(shifted, 1, "pad")
    constant = argument(shifted, 2, "mode", "constant") == "constant"
    filled = argument(shifted, 3, "value") == IGNORED
    if not constant or not filled or tuple(by) != (0, 1):
        return None
    return _unwrapped(operand(shifted)), True, True


def _unwrapped(node: fx.Node) -> fx.Node:
    """A node before reshapes and casts."""
    while op_name(node) in (*RESHAPES, *CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
