"""What tests share: token batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle

IGNORED = -100


def ragged(
    samples: int = 3, length: int = 17, *, seed: int = 1, left: bool = False
) -> dict[str, Any]:
    """Prompts of different lengths, answers, and padding on one side."""
    data = oracle.batch(samples, length, padding=0, seed=seed)
    for row, (prompt, padding) in enumerate([(9, 0), (5, 5), (0, 2)][:samples]):
        data["labels"][row, :prompt] = IGNORED
        if padding:
            part = slice(0, padding) if left else slice(length - padding, None)
            data["attention_mask"][row, part] = 0
            data["labels"][row, part] = IGNORED
    return data


def predicting(data: dict[str, Any]) -> Tensor:
    """Tokens whose prediction carries loss, written independently of the library: label t+1
    counts."""
    labels, dense = data["labels"], torch.zeros_like(data["labels"], dtype=torch.bool)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            dense[row, place] = bool(labels[row, place + 1] != IGNORED)
    return dense


def by_token(model: nn.Module, record: slx.Recording, dense: Tensor, lora_branch: str) -> None:
    """Patch an eager model: masked on context tokens, dense on the others."""

    def patch(module: nn.Module, role: str, chosen: Tensor) -> None:
        weight = module.weight
        mask = torch.zeros(weight.shape[0 if role == "out" else 1], dtype=weight.dtype)
        mask[chosen] = 1

        def forward(x: Tensor) -> Tensor:
            here = dense[..., None]
            full = F.linear(x, weight)
            cut = full * mask if role == "out" else F.linear(x * mask, weight)
            out = torch.where(here, full, cut)
            return out if module.bias is None else out + module.bias

        module.forward = forward  # type: ignore[method-assign]

    for name, (role, chosen) in record.sites.items():
        patch(model.get_submodule(name), role, chosen)
        if lora_branch == "sparse":
            owner = model.get_submodule(name.rpartition(".")[0])
            part = getattr(owner, "lora_B" if role == "out" else "lora_A", None)
            for adapter in part.values() if part is not None else ():
                patch(adapter, role, chosen)
