"""Training calls that keep no KV cache, and otherwise compute what the user's call computes.

See docs/decisions/0013.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from sparselora_fx.runtime.hooks import inputs_of

# What becomes of a cache that the present call would make by itself.
AS_CALLED = ""  # nothing: a dense call is left as it is
LEFT_OUT = "left out"  # there is none
STANDS_IN = "stands in"  # none is kept, but the model computes what it would with one


def takes_use_cache(forward: Callable[..., object], config: object) -> bool:
    """Whether a forward knows ``use_cache``: by name, or (transformers) among its open keywords."""
    known = inspect.signature(forward).parameters
    if "use_cache" in known:
        return True
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    text = getattr(config, "text_config", None)  # of a model that also hears or sees
    return open_ended and (hasattr(config, "use_cache") or hasattr(text, "use_cache"))


def is_unset(arguments: Mapping[str, object]) -> bool:
    """Whether a call says nothing of a cache."""
    return arguments.get("use_cache") is None and arguments.get("past_key_values") is None


def decodes(arguments: Mapping[str, object]) -> bool:
    """Whether a call generates: without gradients, and with a cache. `generate()` is dense, also
    where it is called on a model in training mode."""
    cached = arguments.get("past_key_values") is not None or arguments.get("use_cache")
    return bool(cached) and not torch.is_grad_enabled()


def may_be_packed(arguments: Mapping[str, object]) -> bool:
    """Whether a model of transformers would look for packed samples, if there were no cache:
    ``position_ids`` that restart, and no mask."""
    return arguments.get("position_ids") is not None and arguments.get("attention_mask") is None


def caching_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The models of transformers inside a model that make a cache where a call does not say."""
    library = sys.modules.get("transformers")
    if library is None:
        return
    for module in model.modules():
        if module is model or not isinstance(module, library.PreTrainedModel):
            continue
        names = inspect.signature(module.forward).parameters
        if {"use_cache", "past_key_values"} <= names.keys():
            yield module


def cache_hook(key: int, module: nn.Module) -> Callable[..., object]:
    """A forward pre-hook that keeps a module from making a cache while a call says so: the wrapper
    that calls the module need not know of caches. Run eagerly, and while being traced."""
    names = tuple(inspect.signature(module.forward).parameters)
    stand_in = _stand_in()
    config = module.config
    known = hasattr(config, "use_cache")  # else a model inside it decides
    decoder = not getattr(config, "is_encoder_decoder", False)

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        inputs = inputs_of(key)
        if inputs is None or inputs.caching == AS_CALLED:
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if not known or not is_unset(given):
            return None
        given["use_cache"] = False
        stands_in = inputs.caching == STANDS_IN and getattr(config, "use_cache", False) and decoder
        if stands_in and may_be_packed(given):
            given["past_key_values"] = stand_in(config=config)
        return (), given

    return hook


@functools.cache
def _stand_in() -> Callable[..., object]:
    """A class of caches that stay empty: attention reads the keys and values of the call alone."""
    from transformers import DynamicCache

    class Empty(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: object, value_states: object, *args: object, **kwargs: object
        ) -> object:
            return key_states, value_states

    return Empty
