"""What kind of adapter wraps a frozen linear, told by the names of PEFT's classes.

PEFT is not imported for it.
"""

from __future__ import annotations

from torch import nn

from sparselora_fx.model.frozen_weights import FrozenWeight

_PACKAGE = "peft.tuners."
_NAMES = {
    "lora": "LoRA", "adalora": "AdaLoRA", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA",
    "oft": "OFT", "boft": "BOFT", "ia3": "IA3",
}  # fmt: skip
_SLICED = ("LoRA", "AdaLoRA", "DoRA", "IA3")
_VARIANTS = {"DoraLinearVariant": "DoRA", "ALoraLinearVariant": "aLoRA"}

# Adapters that end a graph in each forward, between their linear and what it feeds.
UNTRACEABLE = ("LoHa", "LoKr", "aLoRA", "target_parameters")

# Why linears with such adapters stay dense, as far as the adapter is the reason.
WHY = {
    **dict.fromkeys(
        ("LoHa", "LoKr"),
        "draws a random number in each forward and asks Python about it, so that no graph holds "
        "both its linear and what that feeds",
    ),
    "aLoRA": "looks for its invocation tokens in Python, so that no graph holds both its linear "
    "and what that feeds",
    **dict.fromkeys(
        ("OFT", "BOFT"), "rotates the linear's input, which mixes the channels to be skipped"
    ),
    "target_parameters": "gives the linear another weight in each forward, and runs uncompiled",
}


def adapter_kind(model: nn.Module, weight: FrozenWeight) -> str | None:
    """The kind of the innermost adapter of PEFT's around a frozen weight ("LoRA", "LoHa", ...);
    None: there is none."""
    name = weight.place
    while name:
        kind = _kind(model.get_submodule(name))
        if kind is not None:
            return kind
        if not name.endswith(".base_layer"):
            return None
        name = name.removesuffix(".base_layer")
    return None


def adapter_words(kind: str | None) -> str:
    """Words to put behind the reason why a linear is dense; empty where its adapter can be
    sliced."""
    if kind in (None, *_SLICED):
        return ""
    return f"; its adapter, {kind}, {WHY[kind]}" if kind in WHY else f"; its adapter is {kind}"


def _kind(module: nn.Module) -> str | None:
    place, _, rest = type(module).__module__.partition(_PACKAGE)
    if place or not rest:
        return None
    if type(module).__name__ == "ParamWrapper":
        return "target_parameters"
    package = rest.split(".")[0]
    held = getattr(module, "lora_variant", {})
    variants = {getattr(v, "__name__", type(v).__name__) for v in dict(held).values()}
    for word, name in _VARIANTS.items():
        if word in variants:
            return name
    return _NAMES.get(package, package)
