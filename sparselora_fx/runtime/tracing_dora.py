"""Let one graph hold a linear of PEFT's DoRA, also inside a checkpointed block.

Three things end a graph between the frozen product and its scale: PEFT asks a plain parameter's
class for its module, it clears a cache, which in training is empty, in each forward, and it makes a
parameter of the transpose of a Conv1D's weight.
"""

from __future__ import annotations

import functools
import sys
import types

import torch
from torch import nn

from sparselora_fx.runtime.copies import StandIn, put, take_off

_CLEAR = "_cache_clear"


class ClearIfFilled(StandIn):
    """The instance-level ``_cache_clear`` of a DoRA layer: what is empty is not changed, so that a
    graph sees no side effect."""

    def __init__(self, cache: dict[str, object]) -> None:
        self.cache = cache

    def __call__(self) -> None:
        if len(self.cache) > 0:
            self.cache.clear()


def trace_dora(model: nn.Module) -> None:
    """Let graphs hold a model's DoRA linears; PEFT is not imported for it."""
    for module in _layers(model):
        put(module, _CLEAR, ClearIfFilled(module._dora_cache))  # type: ignore[arg-type]
    integrations = sys.modules.get("peft.utils.integrations")
    function = getattr(integrations, "dequantize_module_weight", None)
    if isinstance(function, types.FunctionType):
        _substitute_dequantised(function)
    function = getattr(sys.modules.get("peft.utils.other"), "transpose", None)
    if isinstance(function, types.FunctionType):
        _substitute_transposed(function)


def restore_dora(model: nn.Module) -> None:
    """Undo `trace_dora`, but for what is known of PEFT's function for the whole process."""
    for module in _layers(model):
        take_off(module, _CLEAR)


def _layers(model: nn.Module) -> list[nn.Module]:
    held = [module for module in model.modules() if hasattr(module, _CLEAR)]
    return [module for module in held if isinstance(getattr(module, "_dora_cache", None), dict)]


def _copied(function: types.FunctionType) -> types.FunctionType:
    """A function that does the same and is another one to Dynamo."""
    return types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )


@functools.cache
def _substitute_transposed(function: types.FunctionType) -> None:
    """Tell Dynamo, once in a process, that the transpose of a frozen weight need be no parameter:
    in both forms no gradient goes through it. For all else PEFT's own function is traced."""
    own = _copied(function)

    @torch.compiler.substitute_in_graph(function, skip_signature_check=True)
    def transposed(weight: object, fan_in_fan_out: bool) -> object:
        if fan_in_fan_out and isinstance(weight, torch.Tensor) and not weight.requires_grad:
            return weight.T
        return own(weight, fan_in_fan_out)


@functools.cache
def _substitute_dequantised(function: types.FunctionType) -> None:
    """Tell Dynamo, once in a process, that what PEFT calls to dequantise a weight returns a plain
    parameter itself. It does so for any caller; for everything else PEFT's own function is
    traced."""
    own = _copied(function)

    @torch.compiler.substitute_in_graph(function, skip_signature_check=True)
    def dequantised(module: nn.Module) -> object:
        if not hasattr(module, "W_q") and type(module.weight) is nn.Parameter:
            return module.weight
        return own(module)
