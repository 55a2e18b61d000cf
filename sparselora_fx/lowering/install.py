"""Register one lowering per sliced matmul."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sparselora_fx.environment import disabled_layers
from sparselora_fx.graph.layout import Size
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import constraints, gather_matmul, inductor, triton
from sparselora_fx.lowering.inductor import Value

log = logging.getLogger(__name__)


def install() -> None:
    """Teach Inductor the four sliced matmuls and the two weight gradients."""
    for family in triton.FAMILIES.values():
        _register(family.op, _sliced(family))
    for name in ("sliced_linear_wgrad", "sliced_linear_in_wgrad"):
        _register(name, _weight_gradient(name))


def _register(name: str, fn: Callable[..., Value]) -> None:
    inductor.inductor().register_lowering(getattr(OPS, name).default, type_promotion_kind=None)(fn)


def _sliced(family: triton.Family) -> Callable[..., Value]:
    """``(x[..., K], w, idx) -> y[..., N]``: a template where the rules allow one, else gather and
    matmul."""

    def lower(x: Value, w: Value, idx: Value) -> Value:
        problem = triton.problem(family, x, w, idx)
        off = "templates" in disabled_layers()
        reason = constraints.SWITCHED_OFF if off else constraints.ineligible(problem)
        if reason is None and not triton.autotunes():
            reason = constraints.unpromising(problem, triton.measured_ratio(family, problem))
        if reason is not None:
            log.debug("%s: gather + matmul, because %s", family.op, reason)
            return gather_matmul.SLICED[family.op](x, w, idx)
        return triton.lower(family, problem, x, w, idx)

    return lower


def _weight_gradient(name: str) -> Callable[..., Value]:
    """On a GPU: Inductor's own matmul, then one scatter. Elsewhere the op's eager body runs."""
    eager = inductor.fallback(getattr(OPS, name).default)

    def lower(gy: Value, x: Value, idx: Value, n: Size) -> Value:
        if x.get_device().type != "cuda":
            return eager(gy, x, idx, n)
        return gather_matmul.WEIGHT_GRADIENTS[name](gy, x, idx, n)

    return lower
