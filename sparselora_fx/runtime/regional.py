"""Block-wise compilation: each repeated block of a model is compiled on its own.

Blocks that are alike share graphs, as factors, weights and token lists are graph inputs: compile
time does not grow with depth. What lies outside the blocks runs as the model wrote it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparselora_fx import _torch
from sparselora_fx.errors import CompileError
from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.runtime.copies import StandIn, put, take_off

if TYPE_CHECKING:
    from sparselora_fx.runtime.runtime import Runtime


class _WithGradient(torch.autograd.Function):
    """A copy of a tensor that requires a gradient, and drops it."""

    @staticmethod
    def forward(ctx: object, x: Tensor, _: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[None, None]:
        return None, None


_ASKS = torch.zeros((), requires_grad=True)


class CompiledBlock(StandIn):
    """The instance-level ``forward`` of one block: compiled inside a compiled call of the model.

    Under eager activation checkpointing a block runs again in the backward; so does its compiled
    form. Called in any other way, a block runs its own forward.
    """

    def __init__(self, block: nn.Module, runtime: Runtime, compiled: Callable[..., object]) -> None:
        self.block = block
        self.runtime = runtime
        self.compiled = compiled
        self.original: Callable[..., object] = block.forward
        self.first = next(iter(inspect.signature(block.forward).parameters), "")  # argument's name
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: object, **kwargs: object) -> object:
        called = self.runtime.trace_inputs.under_way or _torch.in_backward()
        if not (self.runtime.active and called):
            return self.original(*args, **kwargs)
        x = args[0] if args else kwargs.get(self.first)
        if not isinstance(x, Tensor) or not self._opens(x):
            return self.compiled(*args, **kwargs)
        copy: Tensor = _WithGradient.apply(x, _ASKS)  # type: ignore[no-untyped-call]
        version = copy._version
        if args:
            result = self.compiled(copy, *args[1:], **kwargs)
        else:
            result = self.compiled(**{**kwargs, self.first: copy})
        if copy._version != version:  # the block writes to what it is given
            x.copy_(copy)
        return result

    def _opens(self, x: Tensor) -> bool:
        """Whether a sparse call's first block with adapters, whose input needs no gradient, gets
        one that asks for it: it then runs the graph of all other blocks, not one of its own. That
        gradient is a small part of one block's backward; a graph is a large part of the first
        step."""
        if not (self.runtime.sparse_now and torch.is_grad_enabled()):
            return False
        return (
            x.is_floating_point()
            and not x.requires_grad
            and any(p.requires_grad for p in self.block.parameters())
        )


def repeated_blocks(frozen: list[FrozenWeight]) -> list[str]:
    """Names of the repeated blocks that hold frozen weights; `CompileError` if there are none."""
    names = list(dict.fromkeys(block_names(frozen).values()))
    if not names:
        raise CompileError(
            "regional=True compiles a model block by block, and this model has no list of "
            "numbered blocks (such as 'layers.0', 'layers.1'); leave regional out"
        )
    return names


def compile_blocks(
    runtime: Runtime, names: list[str], backend: Callable[..., object], dynamic: bool | None
) -> None:
    """Give the named blocks compiled forwards."""
    for name in names:
        block = runtime.model.get_submodule(name)
        run = _torch.compile_callable(block.forward, backend, dynamic)
        put(block, "forward", CompiledBlock(block, runtime, run))
        runtime.blocks[name] = block


def restore_blocks(runtime: Runtime) -> None:
    """Give the blocks their own forwards back."""
    for block in runtime.blocks.values():
        take_off(block, "forward")
    runtime.blocks.clear()
