"""One matmul for the factors of predictors that read the same tokens."""

from __future__ import annotations

from torch import fx

from sparselora_fx.graph.nodes import argument, op_name
from sparselora_fx.rewrite.joining import join_alike
from sparselora_fx.rewrite.rewrite import Rewrite


def join_factors(rewrite: Rewrite) -> int:
    """Join the narrow halves ``b x`` of approximated linears. Returns the linears joined.

    Before:  p: [n, R] = linear(x, bq);  q: [n, R] = linear(x, bk);  ...
    After:   y: [n, 2R] = linear(x, cat(bq, bk));  p = narrow(y, -1, 0, R);  q = narrow(y, -1, R, R)
    Keeps:   every choice, up to the rounding of another blocking; nothing here has a gradient.
    Skips:   factors that are computed (an adapter's, where scores follow it).
    Source:  horizontal fusion of matmuls that share an operand.
    """
    factors = {
        site.factors[1]
        for region in rewrite.regions
        for site in region.producers
        if site.factors[1].op == "placeholder"
    }

    def reads_factor(node: fx.Node) -> bool:
        return op_name(node) == "linear" and argument(node, 1, "weight") in factors

    return join_alike(rewrite.graph, reads_factor)
