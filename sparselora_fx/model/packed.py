"""Which quantised linears are understood, and what of them: the quantiser's name, how the matrix
is stored, the tensors that say what it means.

No quantiser is imported: modules and tensors are told by their classes, and what they hold is
looked at. What is not understood to the last tensor is left to `opaque`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_fx.model.attributes import OURS, buffer_name
from sparselora_fx.model.unpacking import NESTED, Layout, unpack

# On some CPUs a bitsandbytes linear with this attribute stores its weight anew, with its scales
# rounded, as soon as it is evaluated.
REPACKS = "support_avx512bf16_for_cpu"
# Whose linears compute no more than a product and a bias.
_HOSTS = ("bitsandbytes", "torch", "torchao", "transformers")
STORAGE = buffer_name("weight", "packed")  # what graphs know a packed weight by


@dataclass(frozen=True)
class Packed:
    """A quantised matrix that is kept in a module's ``weight``.

    Attributes:
        quantiser: its name, for `explain` (``"bitsandbytes nf4"``).
        layout: how it is stored, and its shape.
        storage: the packed elements; the module's own memory.
        held: the tensors beside it that say what it means (`sparselora_fx.model.unpacking`): the
            module's own, or a few numbers made of them.
        dtype: that of the matrix before it was quantised.
        follows_autocast: the quantiser multiplies in the dtype of autocast, where that is on.
    """

    quantiser: str
    layout: Layout
    storage: Tensor
    held: tuple[Tensor, ...]
    dtype: torch.dtype
    follows_autocast: bool = True

    def matrix(self) -> Tensor:
        """All values, ``[N, K]``, in `dtype`; made anew in each call."""
        with torch.no_grad():
            return unpack(self.storage, self.held, self.layout, self.dtype)


def packed_of(module: nn.Module) -> Packed | None:
    """What is known of a quantised linear; None: it is none, or is not understood."""
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.requires_grad or weight.is_meta or _computes_more(module):
        return None
    kinds = {_named(kind) for kind in type(module).__mro__}
    if "bitsandbytes.Linear4bit" in kinds:
        return _four_bits(module, weight)
    if "bitsandbytes.Linear8bitLt" in kinds:
        return _eight_bits(module, weight)
    if "transformers.FP8Linear" in kinds:
        return _tiles(weight, getattr(module, "weight_scale_inv", None), module)
    kind = _named(type(weight))
    if kind in ("torchao.Int8Tensor", "torchao.Float8Tensor", "torchao.IntxUnpackedToInt8Tensor"):
        return _torchao(weight, kind)
    return None


def _computes_more(module: nn.Module) -> bool:
    """Whether a linear's forward is not its quantiser's: a product with its weight may be a part of
    what it computes."""
    own = module.__dict__.get("forward")
    if own is not None and not hasattr(getattr(own, "__func__", own), OURS):
        return True
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return kind.__module__.split(".")[0] not in _HOSTS


def _named(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _four_bits(module: nn.Module, weight: Any) -> Packed | None:
    state: Any = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if why_not(module) or state.shape is None or state.quant_type not in ("nf4", "fp4"):
        return None
    if tuple(state.shape) != (module.out_features, module.in_features):
        return None
    held = [state.code, state.absmax]
    if state.nested:
        if state.state2.blocksize != NESTED:
            return None
        held += [state.state2.absmax, state.state2.code, state.offset]
    n, k = (int(size) for size in state.shape)
    layout = Layout(state.quant_type, n, k, block=int(state.blocksize))
    stored = weight.data.reshape(-1)
    stored = stored if stored.dtype == torch.uint8 else stored.view(torch.uint8)
    if stored.numel() != (n * k + 1) // 2:
        return None  # other elements than the state speaks of
    name = f"bitsandbytes {state.quant_type}" + (" (double)" if state.nested else "")
    return Packed(name, layout, stored, tuple(held), state.dtype, follows_autocast=False)


def why_not(module: Any) -> str:
    """Why a linear whose weight is quantised in a known way is not understood as it stands now;
    empty: it is, or it is something else."""
    weight: Any = module._parameters.get("weight")
    if _computes_more(module):
        return "its forward is not the quantiser's"
    if "bitsandbytes.Linear4bit" not in {_named(kind) for kind in type(module).__mro__}:
        return ""
    state: Any = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        return "it is not quantised yet: move it to its device"
    if getattr(state, "packing_format_for_cpu", False):
        return "it was evaluated, which stored it anew with rounded scales: load it again"
    k, block = module.in_features, state.blocksize
    if weight.device.type == "cpu" and k % block:
        # bitsandbytes itself reads wrong scales there (0.50, AVX512): no values to agree with.
        why = "and some CPUs misread its scales"
        return f"in_features {k} is no multiple of the block, {block}, {why}"
    return ""


def _eight_bits(module: nn.Module, weight: Any) -> Packed | None:
    state: Any = getattr(module, "state", None)
    scales = getattr(weight, "SCB", None)
    scales = getattr(state, "SCB", None) if scales is None else scales
    stored = weight.data
    if getattr(state, "has_fp16_weights", True) or scales is None or stored.dtype != torch.int8:
        return None
    n, k = stored.shape
    held = (scales.float().mul(1 / 127).view(-1, 1),)
    layout = Layout("scaled", n, k, block=k)
    on_cpu = weight.device.type == "cpu"  # elsewhere its own op multiplies, in its own dtype
    # What the matrix was is not kept.
    return Packed("bitsandbytes int8", layout, stored, held, torch.float32, on_cpu)


def _tiles(weight: Tensor, scales: Any, module: nn.Module) -> Packed | None:
    """transformers' FP8 checkpoints: a scale for each tile, or one for all."""
    if weight.dtype != torch.float8_e4m3fn or not isinstance(scales, Tensor):
        return None
    n, k = weight.shape
    size: Any = getattr(module, "block_size", None) or (n, k)
    layout = Layout("scaled", n, k, block=int(size[1]), tall=int(size[0]))
    held = _by_tile(layout, scales)
    if held is None:
        return None
    return Packed("transformers fp8", layout, weight.data, held, torch.bfloat16)


def _torchao(weight: Any, kind: str) -> Packed | None:
    """torchao's weight-only subclasses that store an element a byte."""
    odd = ("act_quant_kwargs", "act_pre_scale", "act_quant_scale", "activation_quantization")
    stored = getattr(weight, "qdata", None)
    if (
        stored is None
        or stored.dim() != 2
        or any(getattr(weight, n, None) is not None for n in odd)
    ):
        return None
    n, k = stored.shape
    tall, wide = (int(size) for size in (weight.block_size or (n, k)))
    zeros = getattr(weight, "zero_point", None)
    layout = Layout("scaled" if zeros is None else "shifted", n, k, block=wide, tall=tall)
    held = _by_tile(layout, weight.scale, *([] if zeros is None else [zeros]))
    if held is None:
        return None
    return Packed(f"torchao {kind.split('.')[1]}", layout, stored, held, weight.dtype)


def _by_tile(layout: Layout, *kept: Tensor) -> tuple[Tensor, ...] | None:
    """What is kept for each tile of a matrix, in their order; None: it is not one number each."""
    shape = (-(-layout.n // layout.tall), -(-layout.k // layout.block))
    if any(tensor.numel() != shape[0] * shape[1] for tensor in kept):
        return None
    return tuple(tensor.detach().float().reshape(shape) for tensor in kept)


@contextmanager
def kept_as_stored(model: nn.Module) -> Iterator[None]:
    """Within it, evaluating a model stores none of its quantised weights anew (see `REPACKS`)."""
    found = [module for module in model.modules() if module.__dict__.get(REPACKS)]
    for module in found:
        setattr(module, REPACKS, False)
    try:
        yield
    finally:
        for module in found:
            setattr(module, REPACKS, True)
