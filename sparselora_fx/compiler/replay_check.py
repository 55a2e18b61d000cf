"""Compare a replay with the call that it replaces, once for each capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselora_fx.compiler.captures import Capture, tensors_at

_BOUND = 0.02  # of a tensor's norm; the order of sums may differ, and with it roundings in bf16


def replays_differently(capture: Capture, args: Sequence[object]) -> bool:
    """Whether a replay's outputs or gradients are not those of the same call run as usual, with the
    same random numbers. Random numbers are afterwards as before; waits for the device."""
    engine = capture.engine
    before = engine.random_state()
    expected = _usual(capture, args)
    engine.set_random_state(before)
    got = _replayed(capture, args)
    engine.set_random_state(before)
    return any(_differ(*pair) for pair in zip(got, expected, strict=True))


def _usual(capture: Capture, args: Sequence[object]) -> list[Tensor | None]:
    inputs, outputs = capture.usual(args)
    ends, roots = tensors_at(outputs, capture.used), tensors_at(inputs, capture.roots)
    ones = [torch.ones_like(end) for end in ends]
    gradients = torch.autograd.grad(ends, roots, ones, allow_unused=True)
    return [*(end.detach() for end in ends), *gradients]


def _replayed(capture: Capture, args: Sequence[object]) -> list[Tensor | None]:
    capture.take(args)
    capture.forward()
    ends = [end.clone() for end in tensors_at(capture.outputs, capture.used)]
    for gradient in capture.gradients:
        gradient.fill_(1)
    capture.backward()
    packed = {dtype: flat.clone() for dtype, flat in capture.packed.items()}
    return [*ends, *capture.unpacked(packed)]


def _differ(got: Tensor | None, expected: Tensor | None) -> bool:
    if got is None or expected is None:
        return got is not expected
    size, off = float(expected.double().norm()), float((got - expected).double().norm())
    finite = size - size == 0  # of a batch that overflows nothing can be said
    return finite and not off <= _BOUND * size + 1e-12
