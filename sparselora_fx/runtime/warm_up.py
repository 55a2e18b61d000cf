"""Compile the levels of a schedule ahead of need, so that no step waits for the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselora_fx.errors import CompileError
from sparselora_fx.model.preserve import kept_buffers, kept_modes, kept_random_numbers
from sparselora_fx.runtime.calls import Call, CallKind
from sparselora_fx.runtime.runtime import Runtime, get_runtime


def warm_up(model: nn.Module, batch: Mapping[str, object]) -> int:
    """Compile every level of a compiled model's schedule from one batch, forward and backward.

    What later steps meet is compiled then: the switch from dense to sparse costs no pause. Weights,
    gradients, buffers, random numbers and modes are afterwards what they were; hooks of the model's
    modules run. Call `step` first if something drives the schedule: undriven, the plan's sparsity
    is its only level. ``compile(..., precompile=True)`` does the same in the first training call,
    with that call's own arguments, and once more after other sizes have made the compiler begin
    anew.

    Args:
        model: compiled with `compile`.
        batch: keyword arguments of the model, the same ones as in training.

    Returns:
        How many graphs were compiled.

    Raises:
        CompileError: the model is not compiled, or its checkpointing is reentrant.
    """
    runtime = get_runtime(model)
    before = runtime.graphs
    with kept_modes(model), torch.enable_grad():
        if not model.training:
            model.train()
        warm_up_levels(runtime, lambda: model(**batch))
    return runtime.graphs - before


def warm_up_levels(runtime: Runtime, call: Callable[[], object]) -> None:
    """Make ``call`` and its backward once at each level of the schedule, and leave no trace."""
    runtime.warm_up_next = False
    parameters = [p for p in runtime.model.parameters() if p.requires_grad]
    ours = {id(module._buffers[name]) for module, name in runtime.attached.buffers}
    recorders, runtime.recorders = runtime.recorders, []
    try:
        with kept_random_numbers(runtime.model), kept_buffers(runtime.model, ours):
            for sparsity_scale in runtime.sparsity_scales():
                runtime.call = Call(CallKind.WARM_UP, level=sparsity_scale)
                backward(call(), parameters)
    finally:
        runtime.call, runtime.recorders, runtime.warm_up_next = Call(), recorders, False


def backward(out: object, parameters: list[nn.Parameter]) -> None:
    """A backward with gradients of zero that touches no ``.grad`` and calls none of its hooks."""
    roots = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not roots or not parameters:
        return
    try:
        torch.autograd.grad(
            roots, parameters, [torch.zeros_like(t) for t in roots], allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise CompileError(
            "compiling ahead needs a backward of its own, which reentrant checkpointing forbids; "
            "pass gradient_checkpointing_kwargs={'use_reentrant': False}, or do not compile ahead"
        ) from error
