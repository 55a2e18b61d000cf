"""What a model's forward takes and returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sparselora_fx.errors import CompileError


def call_arguments(
    names: Sequence[str], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The arguments of a call by name, as far as its callee has ``names`` for them."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def argument_names(forward: Callable[..., object], inner: Callable[..., object]) -> list[str]:
    """The names of positional arguments, in their order: those of a wrapper that names its own
    (PEFT's for a task does, in another order than the model inside), else of what it passes them
    to."""
    return _positional(forward) or _positional(inner)


def _positional(function: Callable[..., object]) -> list[str]:
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper; a model without one is its own."""
    unwrap = getattr(model, "get_base_model", None)
    found = unwrap() if callable(unwrap) else model
    assert isinstance(found, nn.Module)
    return found


def output_embedding(model: nn.Module, *, regional: bool) -> nn.Module:
    """The module that makes the logits."""
    if regional:
        raise CompileError(
            "trim_logits=True needs the whole model in one graph, and regional=True compiles its "
            "blocks apart; leave one of them out"
        )
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        raise CompileError(
            f"trim_logits=True: {type(model).__name__} has no get_output_embeddings() that returns "
            "a module, so it is not known where its logits are made; leave trim_logits out"
        )
    return head
