"""Find the frozen weights of a model: the only thing that an estimator and a plan speak about.

A frozen weight is a 2-D floating parameter with ``requires_grad=False`` that can act as a linear
map. Nothing here imports transformers or peft; both are recognised by structure and by naming
convention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from sparselora_fx.model.opaque import opaque_by
from sparselora_fx.model.packed import STORAGE, Packed, packed_of

_WRAPPERS = frozenset(
    {"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
_FINGERPRINT_VALUES = 1024
_PEFT_PREFIX = "base_model.model."
_ADAPTER_PREFIXES = ("lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector")


@dataclass(frozen=True)
class FrozenWeight:
    """One frozen 2-D parameter and the module that owns it.

    Attributes:
        name: name of ``module`` in ``model.named_modules()``, with ``"." + param`` unless that is
            ``"weight"``: one name for each matrix, also of a module that holds several.
        module: the owner; ``getattr(module, param)`` is the parameter.
        param: attribute name of the parameter, usually ``"weight"``.
        transposed: the parameter is stored ``[in, out]``, as in transformers' ``Conv1D``.
        shared: such names of further modules that hold the same parameter object. Such a parameter
            is listed once, under the first owner.
    """

    name: str
    module: nn.Module
    param: str = "weight"
    transposed: bool = False
    shared: frozenset[str] = frozenset()

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as stored: ``[out, in]``, or ``[in, out]`` if ``transposed``."""
        found = self.module._parameters[self.param]
        assert found is not None, f"{self.name} was removed after it was listed"
        return found

    @property
    def packed(self) -> Packed | None:
        """How a quantised parameter is stored now; None: it is plain."""
        return packed_of(self.module) if self.param == "weight" else None

    @property
    def traced(self) -> torch.Tensor | None:
        """What graphs know it by: the parameter, or the buffer that `compile` puts beside a
        quantised one; None: it was removed."""
        beside = self.module._buffers.get(STORAGE) if self.param == "weight" else None
        return self.module._parameters.get(self.param) if beside is None else beside

    @property
    def oriented(self) -> bool:
        """Whether the kind of module tells how the parameter is stored. Of a layer written by hand
        only its use tells: until then ``transposed`` is a guess."""
        linear = isinstance(self.module, nn.Linear) and self.param == "weight"
        return self.transposed or self.packed is not None or linear

    def logical(self) -> torch.Tensor:
        """A ``[out_features, in_features]`` view of the parameter (no copy). Of a quantised one its
        values, made anew by each call: keep them no longer than needed."""
        packed = self.packed
        if packed is not None:
            return packed.matrix()
        return self.weight.t() if self.transposed else self.weight

    @property
    def out_features(self) -> int:
        """Number of output channels, N."""
        return self._shape[0]

    @property
    def in_features(self) -> int:
        """Number of input channels, K."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        packed = self.packed
        if packed is not None:
            return packed.layout.n, packed.layout.k
        n, k = self.logical().shape
        return int(n), int(k)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values; of a quantised weight, the one that it had before."""
        packed = self.packed
        return self.weight.dtype if packed is None else packed.dtype

    @property
    def canonical(self) -> str:
        """The same name with and without PEFT."""
        return canonical_path(self.name)

    @property
    def place(self) -> str:
        """Name of ``module`` in ``model.named_modules()``."""
        if self.param == "weight":
            return self.name
        return self.name.removesuffix(self.param).removesuffix(".")


def canonical_path(name: str) -> str:
    """Strip what PEFT, ``torch.compile`` and checkpoint wrappers add to a module name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts).removeprefix(_PEFT_PREFIX)


def suffix_distance(key: str, name: str) -> int | None:
    """Steps from module ``name`` up to the deepest ancestor that ``key`` matches by suffix.

    0: ``key`` matches ``name`` itself; 1: its parent; ... ; None: no ancestor matches. Both the
    module name and its canonical form are tried, so a key never has to mention ``base_layer``.
    ``suffix_distance("layers.1.mlp", "base_model.model.layers.1.mlp.up_proj.base_layer") == 1``.
    """
    wanted = key.split(".")
    best: int | None = None
    for path in (name, canonical_path(name)):
        parts = path.split(".")
        for end in range(len(parts), len(wanted) - 1, -1):
            if parts[end - len(wanted) : end] == wanted:
                distance = len(parts) - end
                best = distance if best is None else min(best, distance)
                break
    return best


def frozen_weights(model: nn.Module) -> list[FrozenWeight]:
    """List every frozen weight of ``model`` in ``named_modules()`` order. The model is not changed.

    Counted: 2-D floating parameters with ``requires_grad=False`` owned directly by ``nn.Linear``
    and its subclasses, by transformers' ``Conv1D`` or by any other module (hand-written layers).
    Quantised ones are counted where their storage is understood (see `packed`).
    Not counted: other quantised and sharded weights (see `opaque`), embeddings and weights tied to
    one, the output head (``get_output_embeddings()``), adapter weights (``lora_A``, ``lora_B``,
    ...) even when frozen, and PEFT's unused ``original_module`` copies.
    """
    skipped = _embedding_parameters(model)
    heads = _output_heads(model)
    found: dict[int, FrozenWeight] = {}
    aliases: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in heads or _is_unused(name):
            continue
        for param, value in _candidates(module):
            if id(value) in skipped:
                continue
            full = name if param == "weight" else f"{name}.{param}".lstrip(".")
            if id(value) in found:
                aliases[id(value)].add(full)
                continue
            found[id(value)] = FrozenWeight(full, module, param, _is_conv1d(module))
            aliases[id(value)] = set()
    return [replace(w, shared=frozenset(aliases[key])) for key, w in found.items()]


def frozen_stacks(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every frozen parameter that holds several matrices (one per expert, say).

    Such a stack is no linear, so nothing slices it. Kernels of convolutions do not count.
    """
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or _is_unused(name):
            continue
        for param, value in module._parameters.items():
            if value is None or value.requires_grad or not value.is_floating_point():
                continue
            if value.dim() == 3 and min(value.shape) > 1:
                path = canonical_path(name)
                found.setdefault(id(value), (f"{path}.{param}".lstrip("."), tuple(value.shape)))
    return list(found.values())


def fingerprint_of(weight: torch.Tensor) -> str:
    """``"<N>x<K>:<hash>"`` of a logical ``[N, K]`` weight.

    The hash (sha256, 16 hex digits) covers up to 1024 evenly spaced values rounded to bfloat16, so
    that casting the model to bfloat16 keeps it; strides do not matter.
    """
    n, k = weight.shape
    size = n * k
    count = min(size, _FINGERPRINT_VALUES)
    index = torch.arange(count, device=weight.device) * (size - 1) // max(1, count - 1)
    values = weight.detach()[index // k, index % k].float().to(torch.bfloat16)
    digest = hashlib.sha256(values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()
    return f"{n}x{k}:{digest[:16]}"


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if packed_of(module) is not None:
        yield "weight", module._parameters["weight"]  # type: ignore[misc]
        return
    if opaque_by(module) is not None:
        return
    for param, value in module._parameters.items():
        if value is None or value.requires_grad or param.startswith(_ADAPTER_PREFIXES):
            continue
        if value.dim() == 2 and value.is_floating_point() and value.numel() > 0:
            yield param, value


def _is_conv1d(module: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def _is_unused(name: str) -> bool:
    return any(
        part.startswith(_ADAPTER_PREFIXES) or part == "original_module" for part in name.split(".")
    )


def _embedding_parameters(model: nn.Module) -> set[int]:
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    return {id(p) for module in embeddings for p in module._parameters.values() if p is not None}


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Every module of an output head, for ``model`` itself and for any model nested in it."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(head, nn.Module):
            heads.update(head.modules())
    return heads


def shown(items: list[str], *, quote: bool = True, limit: int = 3) -> str:
    """The first few items and how many more there are, for a message."""
    text = ", ".join(repr(i) if quote else i for i in items[:limit])
    return text + (f" and {len(items) - limit} more" if len(items) > limit else "")
