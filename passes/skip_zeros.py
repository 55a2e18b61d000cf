"""LoRA down-projections read what a selection has left of their input, and not the zeros."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import fx
from torch.utils._pytree import tree_map

from sparselora_fx.analysis.lora import adapter_weights, is_down_projection
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import argument, op_name, operand, tensor
from sparselora_fx.graph.op_families import CASTS
from sparselora_fx.graph.pointwise import is_pointwise
from sparselora_fx.ir.markers import TokenList
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.gather_motion import keeps_last, slice_of
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.token_split import Split, gathered, merged

_SCATTER = OPS.scatter_channels.default
_MERGE = OPS.scatter_two_lists.default
_ROWS = OPS.channel_rows.default


class _Zeros(NamedTuple):
    """Where a value is zero: outside the channels ``idx``, in every token or in the context tokens
    of a split."""

    idx: fx.Node
    split: Split | None


def skip_zeros(rewrite: Rewrite) -> int:
    """Slice each LoRA down-projection whose input is zero outside a selection. Returns how many.

    Before:  h: [T, N] = silu(scatter_channels(c, s, N)) * u;      z: [T, r] = linear(h, A)
    After:   z = sliced_linear_in(gather_channels(h, s), A, s)
    With a token split, h is zero there in context tokens alone:
             z = scatter_two_lists(sliced_linear_in(gather_channels(gather_tokens(h, c), s), A, s),
                              linear(gather_tokens(h, o), A), c, o)
    Keeps:   every finite value and every gradient: 0 * u is 0, and A's columns outside s meet zeros
             only. Then nothing reads h but gathers: `hoist_token_gathers` and
             `hoist_channel_gathers` move them past it, and its other channels, u's too, are never
             made or saved. So it is where the gate of a gated FFN has no adapter (and no bias), as
             with the paper's LoRA targets.
    Skips:   inputs made from a function that is not zero at zero, or from a branch at full width.
    Source:  arXiv 2506.16500 keeps the branches dense; what their zeros allow is ours.
    """
    weights = adapter_weights(site for region in rewrite.regions for site in region.sites)
    answers: dict[fx.Node, _Zeros | None] = {}
    sliced = 0
    for node in list(rewrite.graph.nodes):
        if is_down_projection(node, weights):
            zeros = _zeros(node.args[0], answers)
            if zeros is not None:
                _slice(rewrite.graph, node, zeros)
                sliced += 1
    return sliced


def _slice(graph: fx.Graph, node: fx.Node, zeros: _Zeros) -> None:
    x = operand(node)
    weight = argument(node, 1, "weight")

    def sliced(part: fx.Node) -> fx.Node:
        kept = graph.call_function(OPS.gather_channels.default, (part, zeros.idx))
        return graph.call_function(OPS.sliced_linear_in.default, (kept, weight, zeros.idx))

    with graph.inserting_before(node):
        if zeros.split is None:
            new = sliced(x)
        else:
            context, output = gathered(graph, x, zeros.split)
            dense = graph.call_function(torch.nn.functional.linear, (output, weight))
            parts = sliced(context), dense
            new = merged(graph, *parts, zeros.split, like=node, sizes_of=x)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _zeros(node: object, answers: dict[fx.Node, _Zeros | None]) -> _Zeros | None:
    """Where a value is known to be zero; None: nowhere."""
    if not isinstance(node, fx.Node):
        return None
    if node not in answers:
        answers[node] = _find_zeros(node, answers)
    return answers[node]


def _find_zeros(node: fx.Node, answers: dict[fx.Node, _Zeros | None]) -> _Zeros | None:
    if node.target is _SCATTER:
        idx = node.args[1]
        assert isinstance(idx, fx.Node)
        return _Zeros(idx, None)
    if node.target is _MERGE:
        inner = _zeros(node.args[0], answers)
        if inner is None:
            return None
        context, output = node.args[2:4], node.args[4:6]
        return _Zeros(inner.idx, (TokenList(*context), TokenList(*output)))  # type: ignore[arg-type]
    if tensor(node) is None:
        return None
    if op_name(node) in CASTS or op_name(node) == "dropout" or keeps_last(node):
        return _zeros(node.args[0], answers)
    if op_name(node) == "getitem":
        return _of_slice(node, answers)
    for read in node.all_input_nodes:
        zeros = _zeros(read, answers)
        if zeros is not None and _keeps_zeros(node, read):
            return zeros
    return None


def _keeps_zeros(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a call gives zero wherever one of its operands is zero."""
    made, read = tensor(node), tensor(operand)
    if made is None or read is None or not same_shape(made.shape[-1:], read.shape[-1:]):
        return False
    if not is_pointwise(node):
        return False
    if op_name(node) == "mul":
        return True
    if op_name(node) in ("div", "true_divide", "truediv"):
        return node.args[0] is operand
    return node.all_input_nodes == [operand] and _is_zero_at_zero(node)


def _is_zero_at_zero(node: fx.Node) -> bool:
    """Ask a function of one tensor itself."""
    args, kwargs = tree_map(_zero_for, (tuple(node.args), dict(node.kwargs)))
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif callable(node.target):
        result = node.target(*args, **kwargs)
    return isinstance(result, torch.Tensor) and not result.count_nonzero()


def _zero_for(argument: object) -> object:
    example = tensor(argument) if isinstance(argument, fx.Node) else None
    return argument if example is None else torch.zeros([1] * example.dim(), dtype=example.dtype)


def _of_slice(node: fx.Node, answers: dict[fx.Node, _Zeros | None]) -> _Zeros | None:
    """Zeros of one half of a fused projection, whose rows ``s * stride + offset`` are kept: those
    of the half that holds the rows of one offset alone."""
    found, example = slice_of(node), tensor(node)
    zeros = None if found is None else _zeros(found[0], answers)
    if found is None or example is None or zeros is None or zeros.idx.target is not _ROWS:
        return None
    _, start, step = found
    channels, inner, stride, offsets = cast("tuple[fx.Node, int, int, list[int]]", zeros.idx.args)
    if inner != 1 or stride != step:
        return None
    inside = [at for at in offsets if _meet(at - start, step, int(example.shape[-1]))]
    return _Zeros(channels, zeros.split) if inside == [start] else None


def _meet(shift: int, step: int, width: int) -> bool:
    """Whether rows at a distance from a slice's own can be in it: at its step, and less than its
    width away."""
    return shift % step == 0 and abs(shift // step) < width
