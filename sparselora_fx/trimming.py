"""What ``trim_logits`` needs to know before a graph is traced."""

from __future__ import annotations

from torch import nn

from sparselora_fx.errors import CompileError


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
