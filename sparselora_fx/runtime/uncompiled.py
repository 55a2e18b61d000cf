"""Modules that must run outside compiled graphs: PEFT's adapters on stacks of matrices.

LoRA on a parameter that is no linear's (``target_parameters``; "all-linear" on a mixture of
experts) gives a module another class for the length of each forward. Compiled, every step would
find other classes than the one before and compile its layers anew, until torch's limit.
"""

from __future__ import annotations

import functools
import sys
import warnings

import torch
from torch import nn

from sparselora_fx.runtime.copies import StandIn, put, take_off


class UncompiledForward(StandIn):
    """The instance-level ``forward`` of a module that a compiler passes over."""

    def __init__(self, module: nn.Module) -> None:
        functools.update_wrapper(self, module.forward)
        self.run = torch.compiler.disable(module.forward)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.run(*args, **kwargs)


def leave_uncompiled(model: nn.Module) -> None:
    """Keep what changes its class in each call out of a model's graphs, with a warning."""
    found = _changing(model)
    for module in found:
        put(module, "forward", UncompiledForward(module))
    if found:
        warnings.warn(
            f"{len(found)} modules of the model run uncompiled: PEFT's LoRA on parameters that "
            "are no linears' (target_parameters, or all-linear on a mixture of experts) changes "
            "the class of a module in each call, which no compiled graph survives. To compile "
            "them, target linears alone (target_modules=['q_proj', 'v_proj', ...])",
            stacklevel=3,
        )


def restore_uncompiled(model: nn.Module) -> None:
    """Undo `leave_uncompiled`."""
    for module in _changing(model):
        take_off(module, "forward")


def _changing(model: nn.Module) -> list[nn.Module]:
    """PEFT's wrappers of single parameters. PEFT is not imported for it: a model that has none was
    made without it."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    kind = getattr(layers, "ParamWrapper", None)
    return [module for module in model.modules() if kind is not None and isinstance(module, kind)]
