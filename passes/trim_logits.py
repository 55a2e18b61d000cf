"""Compute the loss on the rows that carry a label: the others cannot change it."""

from __future__ import annotations

import warnings

import torch
from torch import fx

from sparselora_fx.analysis.losses import RESHAPES, ignores_unlabelled, labels_of
from sparselora_fx.graph.nodes import argument, op_name, tensor
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.token_lists import IGNORED
from sparselora_fx.rewrite.rewrite import Rewrite

_MARK = OPS.label_rows.default


def trim_logits(rewrite: Rewrite) -> int:
    """Feed the loss with the rows that carry a label, and return no logits. Returns the losses
    changed.

    Before:  m = label_rows(h, labels, idx, pos);  z: [B, L, V] = linear(m, w)
             t: [B*L] = pad(labels, (0, 1), -100)[..., 1:].view(-1)
             loss = cross_entropy(z.view(-1, V), t);  return loss, z
    After:   loss = cross_entropy(gather_tokens(z.view(-1, V), idx, pos), t at idx, or -100);
             return loss, None
    Keeps:   the loss and every gradient: a row whose label is ignored adds nothing to a sum or a
             mean, and idx holds every other row. `hoist_token_gathers` then moves the gather up,
             past the output embedding, to where other tokens are needed.
    Skips:   a loss whose labels are not the marked ones, or not spelled as above; it says so.
    Source:  liveness analysis: a row without a label is dead.
    """
    graph = rewrite.graph
    marks = [n for n in graph.nodes if n.target is _MARK or n.target is OPS.label_rows]
    changed = 0
    for mark in marks:
        losses = [n for n in graph.nodes if _reads(n, mark)]
        found = [_logits(loss, mark) for loss in losses]
        if losses and all(found):
            for loss, between in zip(losses, found, strict=True):
                assert between is not None
                _trim(graph, loss, between, mark)
                changed += 1
        else:
            warnings.warn(
                "trim_logits: no loss was found that reads these labels through "
                "cross_entropy(logits, labels, ignore_index=-100) alone, so every logit is "
                "computed; pass labels to the model, or leave trim_logits out",
                stacklevel=2,
            )
        mark.replace_all_uses_with(mark.args[0])
        graph.erase_node(mark)
    return changed


def _reads(node: fx.Node, mark: fx.Node) -> bool:
    """Whether a node is a cross entropy whose ignored rows are those that the mark's list lacks."""
    if not ignores_unlabelled(node) or argument(node, 2, "weight") is not None:
        return False
    if argument(node, 6, "reduction", "mean") not in ("mean", "sum"):
        return False
    return labels_of(argument(node, 1, "target")) == (mark.args[1], bool(mark.args[4]), True)


def _logits(loss: fx.Node, mark: fx.Node) -> list[fx.Node] | None:
    """The nodes from the output embedding to the loss's input, if nothing but the loss and the
    graph's output reads them; else None."""
    node = argument(loss, 0, "input")
    between: list[fx.Node] = []
    while isinstance(node, fx.Node) and node is not mark:
        between.append(node)
        inputs = node.all_input_nodes
        step = op_name(node) in (*RESHAPES, *CASTS, "linear", "getitem") or is_pointwise(node)
        if not step or not inputs or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    if node is not mark:
        return None
    allowed = {*between, loss}
    for inner in between:
        if any(user not in allowed and user.op != "output" for user in inner.users):
            return None
    return between


def _trim(graph: fx.Graph, loss: fx.Node, between: list[fx.Node], mark: fx.Node) -> None:
    _, _, idx, pos, _ = mark.args
    logits, target = between[0], argument(loss, 1, "target")
    example = tensor(logits)
    assert example is not None
    with graph.inserting_before(loss):
        gather = graph.call_function(OPS.gather_tokens.default, (logits, idx, pos))
        place = graph.call_method("clamp", (idx,), {"min": 0})
        held = graph.call_function(torch.ge, (idx, 0))
        labels = graph.call_method("index_select", (target, 0, place))
        labels = graph.call_function(torch.where, (held, labels, IGNORED))
    loss.replace_input_with(logits, gather)
    loss.replace_input_with(target, labels)
    output = graph.output_node()
    returned = tuple(None if value in between else value for value in output.args[0])  # type: ignore[union-attr]
    output.args = (returned,)
