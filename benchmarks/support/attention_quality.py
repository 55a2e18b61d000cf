"""How well scores choose the channels of attention regions, by what the compiled attentions return.

All attentions of a Llama are put side by side in one model, so that each reads what it reads in the
dense model, and that model is compiled as any other: a selection is judged by the output that
slicing really gives.

Shape letters: A attentions, B samples, L their length, K the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import sparselora_fx as slx
from benchmarks.support.activations import Batch
from benchmarks.support.quality import Judged
from sparselora_fx.estimator.low_rank import Factors

ORACLE = "tokens+weighted"  # of exact factors: every token's own queries, keys and values


def is_llama(model: nn.Module) -> bool:
    """Whether `Attentions` can be made of a model."""
    return isinstance(model, LlamaForCausalLM)


class Attentions(nn.Module):
    """The attentions of a Llama, each on an input of its own; they share the model's modules."""

    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.config = llama.config
        self.rotary = llama.model.rotary_emb
        self.model = nn.Module()  # weights have the names that they have in the Llama
        self.model.layers = nn.ModuleList(_Holder(each.self_attn) for each in llama.model.layers)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, L, A * K]``, side by side, and ``[B, L]`` -> ``[A, B, L, K]``."""
        inputs = inputs_embeds.chunk(len(self.model.layers), dim=-1)
        length = inputs_embeds.shape[1]
        places = self.rotary(inputs[0], torch.arange(length)[None])
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = seen & attention_mask.bool()[:, None, None, :]
        return torch.stack([
            layer.self_attn(x, position_embeddings=places, attention_mask=seen)[0]
            for layer, x in zip(self.model.layers, inputs, strict=True)
        ])  # fmt: skip


class _Holder(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention


@dataclass
class Cases:
    """Batches for `Attentions`, the outputs of the dense model, and what the best choice is by
    sparsity."""

    model: Attentions
    data: list[Batch]
    dense: list[Tensor] = field(default_factory=list)
    best: dict[float, list[list[Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, llama: Any, batches: Sequence[Batch]) -> Cases:
        """What the attentions of a model read and return on these batches."""
        made = cls(Attentions(llama).eval(), [_inputs(llama, batch) for batch in batches])
        with torch.no_grad():
            made.dense = [made.model(**batch) for batch in made.data]
        return made

    def find_best(self, exact: slx.SVDEstimator, s: float) -> list[Judged]:
        """Judge the choice by every token's exact values, with which others are compared later."""
        chosen, errors = self._run(exact, ORACLE, s)
        self.best[s] = chosen
        return self._judged(chosen, errors, s)

    def judge(self, estimator: slx.SVDEstimator, score: str, s: float) -> list[Judged]:
        """One judgement for each batch and attention, at one sparsity of every attention."""
        return self._judged(*self._run(estimator, score, s), s)

    def _run(
        self, estimator: slx.SVDEstimator, score: str, s: float
    ) -> tuple[list[list[Tensor]], list[tuple[float, float]]]:
        """What each attention chose and its errors, batch by batch."""
        plan = slx.SparsityPlan(
            {"self_attn": s}, tokens="all", start_step=0, channel_multiple=1, score=score
        )
        torch.compiler.reset()
        slx.compile(self.model.train(), estimator, plan=plan, backend="eager")
        chosen, errors = [], []
        try:
            for batch, dense in zip(self.data, self.dense, strict=True):
                with slx.record(self.model) as record:
                    sparse = self.model(**batch).detach()
                chosen += [list(one.values()) for one in record.selections.values()]
                errors += _errors(sparse, dense, batch["attention_mask"].bool())
        finally:
            slx.restore(self.model)
            self.model.eval()
        return chosen, errors

    def _judged(
        self, chosen: list[list[Tensor]], errors: list[tuple[float, float]], s: float
    ) -> list[Judged]:
        pairs = zip(chosen, self.best[s], strict=True)
        shares = [
            torch.cat([torch.isin(x, y) for x, y in zip(one, best, strict=True)])
            for one, best in pairs
        ]
        return [
            Judged(share.double().mean().item(), *each)
            for share, each in zip(shares, errors, strict=True)
        ]


def _errors(sparse: Tensor, dense: Tensor, mask: Tensor) -> list[tuple[float, float]]:
    """For each attention ``|y_C - y| / |y|`` over all tokens, and the mean of it over tokens."""
    lost, size = ((sparse - dense)[:, mask].norm(dim=-1), dense[:, mask].norm(dim=-1))
    whole = lost.norm(dim=-1) / size.norm(dim=-1)
    each = (lost / size.clamp(min=torch.finfo(size.dtype).tiny)).mean(dim=-1)
    return list(zip(whole.tolist(), each.tolist(), strict=True))


@torch.no_grad()
def _inputs(llama: Any, batch: Batch) -> Batch:
    read: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in llama.model.layers
    ]
    llama(**batch)
    for handle in handles:
        handle.remove()
    return {"inputs_embeds": torch.cat(read, dim=-1), "attention_mask": batch["attention_mask"]}


def exact(estimator: slx.SVDEstimator, weights: dict[str, Tensor]) -> slx.SVDEstimator:
    """The estimator with factors that are the weights ``[N, K]`` themselves, of rank K."""
    whole = {
        name: Factors(weight.detach(), torch.eye(weight.shape[1], dtype=weight.dtype))
        for name, weight in weights.items()
    }
    return replace(estimator, factors=estimator.factors | whole)


def of_attentions(estimator: slx.SVDEstimator) -> slx.SVDEstimator:
    """What an estimator knows of attentions."""
    inside = {name for name in estimator.factors if ".self_attn." in name}

    def kept(known: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in known.items() if name in inside}

    return replace(
        estimator, factors=kept(estimator.factors), fingerprint=kept(estimator.fingerprint),
        statistics=kept(estimator.statistics),
    )  # fmt: skip
