"""Which way round hand-written layers store their weights, read off a forward of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.model.frozen_weights import FrozenWeight

_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
_COPIES = ("aten::_to_copy", "aten::clone")


def oriented(weights: Sequence[FrozenWeight], run: Callable[[], object]) -> list[FrozenWeight]:
    """The same weights, with ``transposed`` as each is used in ``run()``. It is called only where
    some weight's module does not tell (`FrozenWeight.oriented`); a weight that is not used in a
    product, or both ways, stays as it is."""
    unsure = [w for w in weights if not w.oriented]
    if not unsure:
        return list(weights)
    with _Uses(unsure) as uses:
        run()
    return [replace(w, transposed=uses.found.get(id(w.weight)) == {True}) if not w.oriented else w
            for w in weights]  # fmt: skip


def as_listed(factors: Factors, listed: FrozenWeight, used: FrozenWeight) -> Factors:
    """Factors of a weight as it is used, as those of the weight as it is listed:
    ``W ~= a b``, so ``W^T ~= b^T a^T``."""
    if listed.transposed == used.transposed:
        return factors
    return Factors(factors.b.t().contiguous(), factors.a.t().contiguous())


class _Uses(TorchDispatchMode):
    """``found``: by id of a weight, whether it was multiplied as stored ``[K, N]``."""

    def __init__(self, weights: Sequence[FrozenWeight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {w.weight.data_ptr(): w.weight for w in weights}
        self.found: dict[int, set[bool]] = {}
        self.copies: list[Tensor] = []  # kept, so that no other tensor gets their memory

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _COPIES and (held := self.weights.get(args[0].data_ptr())) is not None:
            self.weights[out.data_ptr()] = held
            self.copies.append(out)
        for operand, right in _operands(name, args):
            weight = self.weights.get(operand.data_ptr())
            as_stored = None if weight is None else _is_as_stored(operand, weight)
            if weight is not None and as_stored is not None:
                self.found.setdefault(id(weight), set()).add(as_stored == right)
        return out


def _operands(name: str, args: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """The matrices of a product, and of each whether it is ``[K, N]`` on the right of it, or
    ``[N, K]``."""
    if name in _PRODUCTS:
        first = _PRODUCTS[name]
        yield from ((args[first], False), (args[first + 1], True))
    elif name == "aten::linear":
        yield args[1], False


def _is_as_stored(operand: Tensor, weight: Tensor) -> bool | None:
    """Whether an operand is a weight as stored (True) or its transpose (False)."""
    shape, stride = tuple(operand.shape[-2:]), operand.stride()[-2:]
    if shape == tuple(weight.shape) and stride == weight.stride():
        return True
    if shape == tuple(weight.shape)[::-1] and stride == weight.stride()[::-1]:
        return False
    return None
