"""The masked-dense reference for models that multiply with a frozen weight in several places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import sparselora_fx as slx
from tests.support import oracle

_CASTS = ("to", "float", "double", "type_as")
_TURNS = (torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)


class MaskedProducts(TorchFunctionMode):
    """Every product with a recorded weight, as it is stored, cast or transposed, is masked-dense;
    on context tokens only if given.

    ``sparse``: the LoRA branches are cut to the same channels, but not what makes a row's norm.
    """

    def __init__(
        self,
        model: nn.Module,
        record: slx.Recording,
        context: Tensor | None = None,
        *,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        self.known: dict[int, tuple[str, Tensor, bool]] = {}  # role, mask, whether stored [N, K]
        self.memory: dict[int, tuple[str, Tensor]] = {}  # the same by address
        self.held: list[Tensor] = []  # so that no number is given to another tensor
        self.branches: set[int] = set()
        for name, (role, chosen) in record.sites.items():
            linear = model.get_submodule(name)
            nk = not isinstance(linear, Conv1D)
            width = linear.weight.shape[0 if (role == "out") == nk else 1]
            mask = torch.zeros(width, dtype=linear.weight.dtype)
            mask[chosen] = 1
            self.known[id(linear.weight)] = (role, mask, nk)
            self.memory[linear.weight.data_ptr()] = (role, mask)
            if sparse:
                owner = model.get_submodule(name.rpartition(".")[0])
                part = (owner.lora_B if role == "out" else owner.lora_A)["default"].weight
                self.known[id(part)] = (role, mask, True)
                self.branches.add(id(part))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self.known.get(id(args[0])) if args else None
        if own is not None:
            return self._derived(func, args, kwargs or {}, *own)
        if func is F.linear and self._is_known(args[1]):
            x, weight, bias = (*args, None)[:3]
            if id(weight) in self.branches and x.dim() < 3:  # the identity that norms are made from
                return func(*args, **(kwargs or {}))
            return self._masked(x, weight, bias, nk=True)
        if func is torch.addmm and id(args[2]) in self.known:
            bias, x, weight = args
            return self._masked(x, weight, bias, nk=False)
        return func(*args, **(kwargs or {}))

    def _is_known(self, weight: Tensor) -> bool:
        """Whether a weight ``[N, K]`` is a recorded one, or a parameter made of its transpose."""
        if id(weight) not in self.known and weight.data_ptr() in self.memory:
            self.held.append(weight)
            self.known[id(weight)] = (*self.memory[weight.data_ptr()], True)
        return id(weight) in self.known

    def _derived(self, func: Any, args: Any, kwargs: Any, role: str, mask: Tensor, nk: bool) -> Any:
        """What becomes of a weight: another dtype, or the other way round."""
        result = func(*args, **kwargs)
        turned = func in _TURNS or getattr(func, "__name__", "") in ("transpose", "permute")
        if turned or getattr(func, "__name__", "") in _CASTS:
            self.held.append(result)
            self.known[id(result)] = (role, mask.to(result.dtype), nk != turned)
        return result

    def _masked(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, nk: bool) -> Tensor:
        role, mask, stored = self.known[id(weight)]
        assert stored == nk
        logical = weight if nk else weight.t()
        dense = F.linear(x, logical)
        out = dense * mask if role == "out" else F.linear(x * mask, logical)
        if self.context is not None:
            context = self.context if x.dim() == 3 else self.context.flatten()
            out = torch.where(context[..., None], out, dense)
        return out if bias is None else out + bias


def reference_step(model: nn.Module, data: Any, *masked: Any, **words: Any) -> oracle.Step:
    """One step of the eager model with a record's choices (and context tokens), see above."""
    if hasattr(model, "gradient_checkpointing_disable"):
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    with MaskedProducts(model, *masked, **words):
        return oracle.step(model, {**data, "use_cache": False})


def randomise_dora(model: nn.Module) -> nn.Module:
    """Give a DoRA model a non-zero B, and magnitudes that are not the norms of their rows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.6, 1.4, generator=generator))
    return model
