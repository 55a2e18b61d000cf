"""Register one lowering per sliced matmul."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import reduce

from sparselora_fx.environment import disabled_layers
from sparselora_fx.graph.layout import Size
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import constraints, gather_matmul, inductor, selection, triton
from sparselora_fx.lowering.inductor import Value

log = logging.getLogger(__name__)


def install() -> None:
    """Teach Inductor the sliced matmuls, one by one and several at once, the two weight gradients,
    and the choice of channels."""
    for family in triton.FAMILIES.values():
        _register(family.op, _sliced(family))
    _register("topk_channels", selection.topk_channels)
    _register("topk_rows", selection.topk_rows)
    _register("sliced_linears", _several)
    _register("sliced_linear_dgrads", _sum)
    for name in ("sliced_linear_wgrad", "sliced_linear_in_wgrad"):
        _register(name, _weight_gradient(name))


def _register(name: str, fn: Callable[..., Value | list[Value]]) -> None:
    inductor.inductor().register_lowering(getattr(OPS, name).default, type_promotion_kind=None)(fn)


def _sliced(family: triton.Family) -> Callable[..., Value]:
    """``(x[..., K], w, idx) -> y[..., N]``: a template where the rules allow one, else gather and
    matmul."""

    def lower(x: Value, w: Value, idx: Value) -> Value:
        problem = triton.problem(family, x, w, idx)
        if _prefers_template(family, problem):
            found = triton.lower(family, [problem], [x], [w], [idx])
            if found is not None:
                return found
        return gather_matmul.SLICED[family.op](x, w, idx)

    return lower


def _prefers_template(family: triton.Family, problem: constraints.Problem) -> bool:
    off = "templates" in disabled_layers()
    reason = constraints.SWITCHED_OFF if off else constraints.ineligible(problem)
    if reason is None and not triton.autotunes():
        reason = constraints.unpromising(problem, triton.measured_ratio(family, problem))
    if reason is not None:
        log.debug("%s: gather + matmul, because %s", family.op, reason)
    return reason is None


def _several(x: Value, w: Sequence[Value], idx: Sequence[Value]) -> list[Value]:
    """``sliced_linears``: one template for all where each alone would be one, else each alone."""
    family = triton.FAMILIES["sliced_linear"]
    whole = _joint(family, [x] * len(w), w, idx)
    if whole is not None:
        return [gather_matmul.of_weight(whole, i, x) for i in range(len(w))]
    return [_sliced(family)(x, *given) for given in zip(w, idx, strict=True)]


def _sum(gy: Sequence[Value], w: Sequence[Value], idx: Sequence[Value]) -> Value:
    """``sliced_linear_dgrads``: one template for all where each alone would be one, else each
    alone."""
    family = triton.FAMILIES["sliced_linear_dgrad"]
    whole = _joint(family, gy, w, idx)
    if whole is not None:
        return whole
    return reduce(gather_matmul.add, map(_sliced(family), gy, w, idx))


def _joint(
    family: triton.Family, x: Sequence[Value], w: Sequence[Value], idx: Sequence[Value]
) -> Value | None:
    """A template that computes several problems; not where all are benchmarked, each alone."""
    problems = [triton.problem(family, *given) for given in zip(x, w, idx, strict=True)]
    if triton.autotunes() or not all(_prefers_template(family, each) for each in problems):
        return None
    inputs = x[:1] if family.template == "out_sliced" else x
    return triton.lower(family, problems, inputs, w, idx)


def _weight_gradient(name: str) -> Callable[..., Value]:
    """On a GPU: Inductor's own matmul, then one scatter. Elsewhere the op's eager body runs."""
    eager = inductor.fallback(getattr(OPS, name).default)

    def lower(gy: Value, x: Value, idx: Value, n: Size) -> Value:
        if x.get_device().type != "cuda":
            return eager(gy, x, idx, n)
        return gather_matmul.WEIGHT_GRADIENTS[name](gy, x, idx, n)

    return lower
