"""Base weights that are no plain matrices: quantised, or sharded over processes.

Nothing here imports a quantiser: modules and tensors are told by their classes, packages, dtypes
and by the names under which packed weights are kept.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparselora_fx.errors import SparseLoraError
from sparselora_fx.model.packed import packed_of, why_not

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What quantised linears call their packed matrix: GPTQ and AWQ, compressed-tensors, HQQ, AQLM.
_PACKED = ("qweight", "weight_packed", "W_q", "codebooks")
_OWN_TENSORS = ("torch.nn.parameter", "torch._subclasses")  # classes that are still plain weights
_HOSTS = ("torch", "peft", "transformers", "builtins", "__main__")  # these do not name a quantiser


class Opaque(NamedTuple):
    """A module whose matrix is no plain one: its name, what made it so, and how."""

    name: str
    by: str
    sharded: bool

    @property
    def why(self) -> str:
        return f"{'sharded' if self.sharded else 'quantised'} by {self.by}"


def opaque_by(module: nn.Module) -> tuple[str, bool] | None:
    """What quantised or sharded a module's own matrix, and whether it is sharded; None: it is
    plain, or quantised in a way that is understood (`packed`)."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or packed_of(module) is not None:
        return None
    held = {**module._parameters, **module._buffers}
    named = [(name, tensor) for name, tensor in held.items() if tensor is not None]
    plain = any(_is_plain_matrix(name, t) for name, t in module._parameters.items())
    for name, tensor in named:
        sharder = _sharder(tensor)
        if sharder:
            return sharder, True
        # Of a hand-written module's parameters some may be codes, and others matrices.
        whole = name == "weight" or (name in module._parameters and not plain)
        if name in _PACKED or (whole and _is_odd_matrix(tensor)):
            return _quantiser(module, tensor), False
    if any(name in _PACKED and value is not None for name, value in module.__dict__.items()):
        return _quantiser(module, torch.empty(0)), False
    if not _is_linear(module):
        return None
    # compressed-tensors rounds inputs on the way, also once it has unpacked the weight in place.
    if "quantization_scheme" in module.__dict__:
        return _quantiser(module, torch.empty(0)), False
    odd = [tensor for _, tensor in named if tensor.dtype not in _PLAIN and tensor.numel() > 1]
    return (_quantiser(module, odd[0]), False) if odd and not plain else None


def _is_odd_matrix(tensor: Tensor) -> bool:
    """Whether it is frozen, and its elements are not those of a plain matrix."""
    odd = tensor.dtype not in _PLAIN or tensor.is_sparse or is_foreign(tensor)
    return odd and tensor.dim() >= 2 and not tensor.requires_grad


def _is_plain_matrix(name: str, tensor: Tensor | None) -> bool:
    """Whether a parameter is a matrix as it stands; biases and scales of experts are none."""
    if tensor is None or tensor.dim() != 2 or any(word in name for word in ("bias", "scale")):
        return False
    return tensor.dtype in _PLAIN and not tensor.is_sparse and not is_foreign(tensor)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module says that it is a linear, whatever it keeps its matrix in."""
    sized = "in_features" in module.__dict__ or "infeatures" in module.__dict__
    return sized or isinstance(module, nn.Linear) or "Linear" in type(module).__name__


def opaque_modules(model: nn.Module) -> list[Opaque]:
    """Every module of a model whose own matrix is quantised or sharded, in order."""
    found = ((name, opaque_by(module)) for name, module in model.named_modules())
    return [Opaque(name, *by) for name, by in found if by is not None]


def refuse_opaque(model: nn.Module, plain: int, error: type[SparseLoraError]) -> None:
    """Raise if sharded weights, or nothing but quantised ones, are all that a model has to slice;
    warn if some of its linears are quantised.

    Args:
        model: only read.
        plain: how many plain frozen weights it has.
        error: the type to raise.
    """
    found = opaque_modules(model)
    sharded = [item for item in found if item.sharded]
    if sharded:
        raise error(
            f"{len(sharded)} modules of the model are {_by(sharded)} (first: {sharded[0].name}), "
            "and rows and columns can be taken of whole matrices only; compile a model that is not "
            "sharded: leave fully_shard, FSDP, tensor parallelism or ZeRO-3 out and train in one "
            "process, with the whole base on its device"
        )
    if found and not plain:
        raise error(
            f"the base is {_by(found)} ({len(found)} linears, first: {found[0].name}), which is "
            "not supported: of quantised bases bitsandbytes' 4 and 8 bits, torchao's weight-only "
            "int8, float8 and intx, and transformers' fp8 are; load the base with one of these, or "
            "with a quantization_config that says dequantize=True (CompressedTensorsConfig, "
            "FineGrainedFP8Config and others have it), or without quantization_config "
            "(dtype=torch.bfloat16), or call base.dequantize(), then attach LoRA and compile"
        )


def warn_opaque(model: nn.Module, plain: int) -> None:
    """Warn where some of a model's linears are quantised: they stay dense."""
    found = opaque_modules(model)
    if found:
        warnings.warn(
            f"{len(found)} of {len(found) + plain} frozen linears are {_by(found)} (first: "
            f"{found[0].name}) and stay dense; load the base without quantization_config to have "
            "them sparse too",
            stacklevel=4,
        )


def _by(found: list[Opaque]) -> str:
    return " and ".join(Counter(item.why for item in found))


def is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that computes in a way of its own."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter) or kind.__module__.startswith(_OWN_TENSORS):
        return False
    known = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
    functions = {getattr(f, "__func__", f) for f in known}
    own = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or own not in functions


def _sharder(tensor: Tensor) -> str:
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        return "fully_shard (FSDP2) or tensor parallelism, into DTensors"
    if kind.__name__ == "FlatParameter" or hasattr(tensor, "_is_flat_param"):
        return "FullyShardedDataParallel"
    return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else ""


def _quantiser(module: nn.Module, tensor: Tensor) -> str:
    """The package that quantised a weight, with the class that tells it, and what is wrong with a
    weight of a kind that is understood."""
    for kind in (type(tensor), type(module)):
        package = kind.__module__.split(".")[0]
        if package not in _HOSTS:
            why = why_not(module)
            return f"{package} ({kind.__name__}{'; ' if why else ''}{why})"
    if hasattr(module, "quantization_scheme"):
        return "compressed-tensors"
    for kind in (type(tensor), type(module)):
        if kind not in (Tensor, nn.Parameter, nn.Linear):
            return kind.__name__
    return f"a weight of {tensor.dtype}"
