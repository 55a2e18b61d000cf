"""Block-wise compilation: each repeated block of a model is compiled on its own.

Blocks that are alike share graphs, as factors, weights and token lists are graph inputs: compile
time does not grow with depth. What lies outside the blocks runs as the model wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from sparselora_fx import _torch
from sparselora_fx.errors import CompileError
from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.runtime.copies import StandIn, put, take_off

if TYPE_CHECKING:
    from sparselora_fx.runtime.runtime import Runtime


class CompiledBlock(StandIn):
    """The instance-level ``forward`` of one block: compiled inside a compiled call of the model.

    Under eager activation checkpointing a block runs again in the backward; so does its compiled
    form. Called in any other way, a block runs its own forward.
    """

    def __init__(self, block: nn.Module, runtime: Runtime, compiled: Callable[..., Any]) -> None:
        self.block = block
        self.runtime = runtime
        self.compiled = compiled
        self.original: Callable[..., Any] = block.forward
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runtime.active and (self.runtime.trace_inputs.inside or _torch.in_backward()):
            return self.compiled(*args, **kwargs)
        return self.original(*args, **kwargs)


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
    runtime: Runtime, names: list[str], backend: Callable[..., Any], dynamic: bool | None
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
