"""The two matmuls of a LoRA branch, told by what they read and by their shapes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sparselora_fx.analysis.regions import Site
from sparselora_fx.graph.nodes import argument, op_name, tensor

_NARROW = 4  # the rank is at least this many times smaller than the width on the other side


def adapter_weights(sites: Iterable[Site]) -> set[fx.Node]:
    """The trained matrices that the LoRA branches of some sites read."""
    return {weight for site in sites for weight in site.adapter_weights}


def is_down_projection(node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether a node is ``linear(x[..., N], A[r, N])`` for a trained A with r well below N.

    Rule:   a linear without a bias whose weight some site's branch reads, by its shape.
    Sound:  passes that ask rewrite to the same product in another order or over the columns that
            are not zero: a linear that is no adapter's would be computed as exactly.
    """
    sizes = _sizes(node, weights)
    return sizes is not None and sizes[0] * _NARROW <= sizes[1]


def is_up_projection(node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether a node is ``linear(z[..., r], B[N, r])`` for a trained B with r well below N."""
    sizes = _sizes(node, weights)
    return sizes is not None and sizes[1] * _NARROW <= sizes[0]


def _sizes(node: fx.Node, weights: set[fx.Node]) -> tuple[int, int] | None:
    if op_name(node) != "linear" or argument(node, 2, "bias") is not None:
        return None
    weight = argument(node, 1, "weight")
    example = tensor(weight) if weight in weights else None
    if example is None or example.dim() != 2:
        return None
    return int(example.shape[0]), int(example.shape[1])
