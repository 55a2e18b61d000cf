"""How well a selection matches the channels that matter: its overlap with the true top k.

A channel of a feed-forward region matters by the norm of its dense activation over the tokens, at
the input of the output projection (paper, section 3.2). Random channels overlap by k / N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import sparselora_fx as slx


@dataclass(frozen=True)
class Overlap:
    """Shares from 0 to 1: of the chosen channels in the true top k, and of k in N."""

    found: float
    chance: float


def overlaps(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Overlap]:
    """The overlap of each feed-forward region, by region name, for one batch.

    The model is compiled by sparselora_fx. It takes one training forward for its choices and one
    in eval mode, which is dense, for the truth; it is left in training mode. Tokens of
    `attention_mask` 0 do not count.
    """
    model.train()
    with slx.record(model) as record:
        model(**batch)
    chosen = {region: c["ffn"] for region, c in record.selections.items() if "ffn" in c}
    consumers = {
        name.removesuffix(".base_layer"): name
        for name, (side, _) in record.sites.items()
        if side == "in"
    }
    norms = _input_norms(model, batch, list(consumers.values()))
    truth = {name.rpartition(".")[0]: norms[full] for name, full in consumers.items()}
    return {region: _overlap(kept, truth[region]) for region, kept in chosen.items()}


def _overlap(kept: Tensor, norms: Tensor) -> Overlap:
    best = norms.topk(len(kept)).indices
    return Overlap(torch.isin(kept, best).double().mean().item(), len(kept) / len(norms))


@torch.no_grad()
def _input_norms(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Norms over tokens of the inputs of the named linears in the dense model."""
    norms: dict[str, Tensor] = {}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        norms[name] = args[0][mask].norm(dim=0)

    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(keep, n)) for n in names]
    model.eval()
    try:
        model(
            **{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")},
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    return norms
