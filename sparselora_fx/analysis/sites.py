"""Which linear a marked weight is used in, and whether it can be sliced there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from sparselora_fx.analysis.branches import LINEAR_CASTS
from sparselora_fx.analysis.linears import linear_parts, products
from sparselora_fx.analysis.reasons import WITHOUT
from sparselora_fx.analysis.regions import Site, Skip, is_trainable
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import before_flattening, op_name, tensor
from sparselora_fx.ir.markers import WITHOUT_GRADIENTS, MarkedTokens, SiteSpec


def site_of(weight: fx.Node, args: tuple[Any, ...], markers: int) -> Site | Skip:
    """What a marker says of a weight, and where the weight is used; or why it stays dense.

    Rule:   every use of the weight that matters to its channels (`linears.products`) is a linear
            over the last dimension, of one input, in a graph that marks the weight once.
    Sound:  a site is claimed only of linears whose operands are all known; else there is a reason.

    Args:
        args: those of the marker, whose result has been replaced by its input.
        markers: how many markers the weight has in this graph.
    """
    uses = sorted(products(weight), key=lambda use: use[0])  # in the order of the graph
    reason = _refusal(weight, args[5], uses, markers)
    if reason is not None:
        return Skip(weight, reason)
    node, view, transposed = uses[0]
    parts = linear_parts(node, view)
    shape, out = tensor(weight), tensor(node)
    if parts is None or shape is None or out is None or shape.dim() != 2:
        what = f"{op_name(node)} with this weight"
        return Skip(weight, f"{what} is not a linear over the last dimension")
    x, bias, stored_as_kn = parts
    transposed = transposed != stored_as_kn
    n, k = (int(s) for s in (reversed(shape.shape) if transposed else shape.shape))
    x_value = tensor(x)
    if x_value is None or not _ends_with(x_value, k) or not _ends_with(out, n) or n == k == 0:
        return Skip(weight, "the linear does not act on the last dimension of its input")
    if x_value.dim() < 2:
        why = "its input is a single vector: there are no tokens to score channels by"
        return Skip(weight, why)
    spec = SiteSpec.decode(args[5])
    statistics = dict(zip(spec.statistics, (args[6] or ()) if len(args) > 6 else (), strict=True))
    site = Site(
        node,
        x,
        weight,
        transposed,
        bias,
        (args[2], args[3]),
        MarkedTokens.decode(args[4]),
        spec,
        n,
        k,
    )
    site.statistics = statistics
    for again, its_view, _ in uses[1:]:
        found = linear_parts(again, its_view)
        assert found is not None
        site.more[again] = found[0]
    return site


def _refusal(
    weight: fx.Node, spec: str, uses: list[tuple[fx.Node, fx.Node, bool]], markers: int
) -> str | None:
    """Why a weight stays dense whatever its linear looks like, or None."""
    if is_trainable(weight):
        return "the weight trains"
    if spec == WITHOUT_GRADIENTS:
        return (
            f"{WITHOUT} (a reversible layer, say): a backward that runs it again would not be "
            "sliced"
        )
    if markers > 1 or not _share_input(uses):
        return (
            "the weight is used more than once in this graph, and its uses would have to share one "
            "choice of channels (a block that is applied several times gets one for each use where "
            "it is checkpointed)"
        )
    return None if uses else "the weight is not used by a linear that is recognised"


def _share_input(uses: list[tuple[fx.Node, fx.Node, bool]]) -> bool:
    """Whether all products read one input, through dropouts and casts perhaps, as DoRA's do: they
    share a choice of channels."""
    if len(uses) < 2:
        return True
    parts = [part for node, view, _ in uses if (part := linear_parts(node, view)) is not None]
    if len(parts) < len(uses):
        return False
    # Which way round the weight is multiplied with: a Conv1D's own product is an addmm, DoRA's
    # second one a linear.
    stored = {use[2] != part[2] for use, part in zip(uses, parts, strict=True)}
    read = {_undropped(part[0]) for part in parts}
    unbiased = all(part[1] is None for part in parts[1:])
    return len(read) == len(stored) == 1 and unbiased


def _undropped(x: fx.Node) -> fx.Node:
    """What a value was before dropouts, casts, and its tokens were flattened."""
    while True:
        x = before_flattening(x)
        if op_name(x) not in ("dropout", *LINEAR_CASTS) or not isinstance(x.args[0], fx.Node):
            return x
        x = x.args[0]


def _ends_with(value: Tensor, channels: int) -> bool:
    return same_shape(value.shape[-1:], (channels,))
