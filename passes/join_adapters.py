"""One matmul for the LoRA down-projections that read the same input."""

from __future__ import annotations

from sparselora_fx.analysis.lora import adapter_weights, is_down_projection
from sparselora_fx.rewrite.joining import join_alike
from sparselora_fx.rewrite.rewrite import Rewrite


def join_adapters(rewrite: Rewrite) -> int:
    """Join the down-projections of a rewritten region's LoRA branches. Returns the linears joined.

    Before:  p: [T, r] = linear(x, Aq);  q: [T, r] = linear(x, Ak);  ...     three reads of x
    After:   y: [T, 2r] = linear(x, cat(Aq, Ak));  p = narrow(y, -1, 0, r);  q = narrow(y, -1, r, r)
    Keeps:   every value and gradient, up to the rounding of another blocking. The gradient to x
             becomes one matmul, where several results were added.
    Skips:   branches behind dropouts of their own, which read different inputs; branches with a
             write between them; and graphs that keep some gradient from flowing back, because a
             branch without one (None) would get zeros.
    Source:  horizontal fusion of matmuls that share an operand.
    """
    if rewrite.cuts_gradients:
        return 0
    sites = [site for region in rewrite.regions for site in region.sites]
    weights = adapter_weights(sites)
    return join_alike(rewrite.graph, lambda node: is_down_projection(node, weights))
