"""Which part of a model of several stacks reads the batch's tokens."""

from __future__ import annotations

from torch import nn

from sparselora_fx.model.blocks import block_names
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.signature import base_model


def beside_text(model: nn.Module, weights: list[FrozenWeight]) -> frozenset[str]:
    """Names of the frozen weights that lie outside the text part of a model: a vision tower's, a
    projector's. Empty for models with one stack, or that do not say where their words are embedded.

    The text part is the smallest module around the embedding of words that has repeated blocks.
    """
    blocks = block_names(weights)
    place = _place_of_words(model)
    while place:
        place = place.rpartition(".")[0]
        inside = f"{place}." if place else ""
        if any(weight.name in blocks and weight.name.startswith(inside) for weight in weights):
            return frozenset(w.name for w in weights if not w.name.startswith(inside))
    return frozenset()


def _place_of_words(model: nn.Module) -> str:
    """The name of the module that embeds words; empty if the model does not say it."""
    ask = getattr(base_model(model), "get_input_embeddings", None)
    try:
        words = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):  # as transformers' models without words say it
        return ""
    return next((name for name, module in model.named_modules() if module is words), "")
