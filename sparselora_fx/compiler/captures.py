"""One captured forward and backward, and calls that replay it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselora_fx.compiler.capture_engine import Engine

_ALIGNED = 32  # elements: each gradient begins where vectors of it may be read


class Capture:
    """A compiled graph's forward and backward at one combination of sizes.

    Attributes:
        inputs: what the graph was captured with: parameters and buffers themselves (without their
            hooks), and buffers of our own for what changes from call to call.
        outputs: what its forward writes.
        roots: places of the inputs that need a gradient.
        used: places of the outputs that gradients come for.
    """

    forward: Callable[[], None]
    backward: Callable[[], None]

    def __init__(
        self,
        compiled: Callable[..., object],
        extra: int,
        engine: Engine,
        used: Sequence[int],
    ) -> None:
        self.compiled = compiled
        self.extra = extra
        self.engine = engine
        self.used = list(used)
        self.inputs: list[object] = []
        self.outputs: list[object] = []
        self.needing: list[int] = []  # places of the outputs that need a gradient
        self.roots: list[int] = []
        self.copied: list[int] = []  # places of the inputs that are copied in
        self.gradients: list[Tensor] = []  # of the outputs in ``used``: copied in
        self.packed: dict[torch.dtype, Tensor] = {}  # what the backward writes, end to end
        self.parts: list[_Part | None] = []  # where each root's gradient is in it

    def record(self, args: Sequence[object], moving: Sequence[int]) -> None:
        """Capture forward and backward with the inputs of a call.

        Args:
            args: the call's.
            moving: places of inputs that are other tensors in other calls.

        Raises:
            RuntimeError: something that cannot be captured, or not be replayed right.
        """
        devices = {a.device.type for a in args if isinstance(a, Tensor)} - {self.engine.device}
        if devices:
            raise RuntimeError(f"it reads tensors on {', '.join(sorted(devices))}")
        self.inputs = [_alias(arg) if isinstance(arg, Tensor) else arg for arg in args]
        self.copied = [i for i in moving if isinstance(args[i], Tensor)]
        for i, arg in zip(self.copied, tensors_at(args, self.copied), strict=True):
            self.inputs[i] = _buffer(arg)
        self.roots = [i for i, x in enumerate(self.inputs) if _needs_gradient(x)]
        versions = self._versions()
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights cast in a capture live in its memory
        try:
            self._record()
        finally:
            torch.set_autocast_cache_enabled(cached)
        if versions != self._versions():
            raise RuntimeError("it writes to its inputs or to a buffer of the model")

    def _versions(self) -> list[int]:
        return [value._version for value in self.inputs if isinstance(value, Tensor)]

    def usual(self, args: Sequence[object]) -> tuple[list[object], Sequence[object]]:
        """A call as usual: inputs of no history, and its outputs."""
        inputs = [_alias(arg) if isinstance(arg, Tensor) else arg for arg in args]
        with torch.enable_grad():
            outputs = self.compiled(*inputs)
        assert isinstance(outputs, tuple | list)
        return inputs, outputs

    def _record(self) -> None:
        self.forward, outputs = self.engine.capture(lambda: self.compiled(*self.inputs))
        assert isinstance(outputs, tuple | list)
        self.needing = [i for i, out in enumerate(outputs) if _needs_gradient(out)]
        roots, ends = tensors_at(self.inputs, self.roots), tensors_at(outputs, self.used)
        self.gradients = [torch.zeros_like(end) for end in ends]

        def backward() -> None:
            found = torch.autograd.grad(ends, roots, self.gradients, allow_unused=True)
            self._pack(found)

        self.backward, _ = self.engine.capture(backward)
        # Without their history, which has been used up.
        self.outputs = [out.detach() if isinstance(out, Tensor) else out for out in outputs]
        # All but the extra outputs are copied as soon as they are there: a capture for each of
        # several sizes must not hold logits and gradients of its own.
        unowned = self.engine.unowned
        for place, out in enumerate(self.outputs[: len(outputs) - self.extra]):
            if isinstance(out, Tensor):
                self.outputs[place] = unowned(out)
        self.packed = {dtype: unowned(flat) for dtype, flat in self.packed.items()}

    def _pack(self, found: Sequence[Tensor | None]) -> None:
        """Lay gradients end to end, so that one copy takes all of them out."""
        lengths: dict[torch.dtype, int] = {}
        self.parts = []
        for gradient in found:
            if gradient is None:
                self.parts.append(None)
                continue
            start = lengths.get(gradient.dtype, 0)
            self.parts.append(_Part(gradient.dtype, start, gradient.shape))
            lengths[gradient.dtype] = start + -(-gradient.numel() // _ALIGNED) * _ALIGNED
        device = self.gradients[0].device
        self.packed = {d: torch.empty(n, dtype=d, device=device) for d, n in lengths.items()}
        kept = [gradient for gradient in found if gradient is not None]
        into = [view for view in self.unpacked(self.packed) if view is not None]
        torch._foreach_copy_(into, kept)

    def unpacked(self, packed: dict[torch.dtype, Tensor]) -> list[Tensor | None]:
        """The gradient of each root in tensors like ``packed``; None where there is none."""
        return [None if part is None else part.of(packed[part.dtype]) for part in self.parts]

    def take(self, args: Sequence[object]) -> None:
        """Copy in what a call brings."""
        held = tensors_at(self.inputs, self.copied)
        for into, arg in zip(held, tensors_at(args, self.copied), strict=True):
            into.data.copy_(arg.detach())


class _Part(NamedTuple):
    """A gradient's place among those of its dtype."""

    dtype: torch.dtype
    start: int
    shape: torch.Size

    def of(self, packed: Tensor) -> Tensor:
        return packed[self.start : self.start + self.shape.numel()].view(self.shape)


class Pool:
    """The memory that a model's captures share: one call's values at a time.

    Attributes:
        forwards: replayed so far, of whatever capture.
        pending: the last of them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.forwards = 0
        self.pending: weakref.ref[Pending] | None = None

    def waits(self) -> bool:
        """Whether the last replayed forward still waits for its backward."""
        pending = self.pending() if self.pending is not None else None
        return pending is not None and not pending.done


class Pending:
    """A replayed call, until its backward has come; it answers that."""

    def __init__(self, capture: Capture, args: tuple[object, ...], pool: Pool) -> None:
        self.capture = capture
        self.args = args
        self.pool = pool
        self.done = False
        self.random = pool.engine.random_state()
        self.versions = self._versions()
        pool.forwards += 1
        pool.pending = weakref.ref(self)
        self.number = pool.forwards

    def _versions(self) -> list[int]:
        return [root._version for root in tensors_at(self.args, self.capture.roots)]

    def answer(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient of each root, of those of the outputs that need one."""
        capture = self.capture
        given = dict(zip(capture.needing, gradients, strict=True))
        asked = [place for place, gradient in given.items() if gradient is not None]
        if self.done or self.number != self.pool.forwards or set(asked) - set(capture.used):
            return self._computed_again(asked, [given[place] for place in asked])
        self.done = True
        for place, held in zip(capture.used, capture.gradients, strict=True):
            gradient = given[place]
            held.zero_() if gradient is None else held.copy_(gradient)
        capture.backward()
        # Copies: a parameter keeps its gradient, and the next backward writes here again.
        return capture.unpacked({dtype: flat.clone() for dtype, flat in capture.packed.items()})

    def _computed_again(
        self, asked: Sequence[int], gradients: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """The same without the capture, whose memory holds other values by now or lacks what is
        asked: by a forward with the same random numbers."""
        if self.versions != self._versions():
            raise RuntimeError(
                "a backward came after the parameters of its forward had been changed, and this "
                "call was replayed as a CUDA graph; call backward before the optimizer's step, or "
                "compile with cuda_graphs=False"
            )
        engine, roots = self.pool.engine, self.capture.roots
        now = engine.random_state()
        engine.set_random_state(self.random)
        try:
            inputs, outputs = self.capture.usual(self.args)
        finally:
            engine.set_random_state(now)
        self.done = True
        return torch.autograd.grad(
            tensors_at(outputs, asked), tensors_at(inputs, roots), gradients, allow_unused=True
        )  # fmt: skip


class _Ctx(Protocol):
    """What autograd hands from a forward to its backward; PyTorch's own class names none of it."""

    pending: Pending

    def set_materialize_grads(self, value: bool) -> None: ...


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Ctx, pending: Pending, *roots: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pending = pending
        capture = pending.capture
        capture.take(pending.args)
        capture.forward()
        return tuple(out.clone() for out in tensors_at(capture.outputs, capture.needing))

    @staticmethod
    @once_differentiable
    def backward(ctx: _Ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.pending.answer(gradients)


def replayed(capture: Capture, args: tuple[object, ...], pool: Pool) -> tuple[object, ...]:
    """A call's outputs by replay. The caller may keep them, but for the extra ones."""
    pending = Pending(capture, args, pool)
    results = _Replay.apply(pending, *(args[i] for i in capture.roots))  # type: ignore[no-untyped-call]
    outputs = list(capture.outputs)
    for place, out in enumerate(outputs[: len(outputs) - capture.extra]):
        if isinstance(out, Tensor) and place not in capture.needing:
            outputs[place] = out.clone()
    for place, result in zip(capture.needing, results, strict=True):
        outputs[place] = result
    return tuple(outputs)


def tensors_at(values: Sequence[object], places: Iterable[int]) -> list[Tensor]:
    """Some of a graph's inputs or outputs, of which it is known that they are tensors."""
    found = [values[place] for place in places]
    tensors = [value for value in found if isinstance(value, Tensor)]
    assert len(tensors) == len(found)
    return tensors


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _alias(tensor: Tensor) -> Tensor:
    """The same memory without history and hooks."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _buffer(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, of the same strides."""
    if any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise RuntimeError("one of its inputs is an expanded tensor")
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)
