"""SparseLoRA as its reference implementation does it: eager modules swapped in, layer by layer.

The peer that `sparselora_fx` is measured against: the same algorithm, written as one would without
a compiler. Per sparse layer an SVD predictor picks channels, tokens are split where the batch's
earliest answer begins (which waits for the device once a step), weights are gathered, projections
with a LoRA branch are scattered back to full width, and the halves are concatenated.

Two things differ from the reference implementation, in its favour or ours by an option: query
channels are mapped to the kv heads that they attend to, and gradients are exact. With
``cut_gradients=True`` scatter and gather run without gradients, as there: the backward is then
cheaper, and wrong. Semantics: `sparselora_fx.analysis.regions`. Models: transformers' Llama with
PEFT.

Letters: B samples, L tokens, K input channels, N channels of a region, S kept ones, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselora_fx.analysis.regions import kept_channels

Factors = tuple[Tensor, Tensor]  # a [N, R] and b [R, K]
Fixed = Mapping[str, Mapping[str, Tensor]]  # region -> choice -> channels, as a Recording has them


@dataclass
class Shared:
    """What swapped modules of one model share: where this step's tokens are split."""

    split: int | None = None
    undo: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def swap(self, module: nn.Module, forward: Any) -> None:
        """Put a forward on a module; `restore` takes it off."""
        self.undo.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def restore(self) -> None:
        """Take every swapped forward off again."""
        for module, before in reversed(self.undo):
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        self.undo.clear()


def apply(
    model: nn.Module,
    factors: Mapping[str, Factors],
    levels: Sequence[tuple[float, float]],
    *,
    tokens: str = "context",
    multiple: int = 16,
    cut_gradients: bool = False,
    fixed: Fixed | None = None,
) -> Shared:
    """Swap sparse modules into a PEFT Llama, in place.

    Args:
        model: LoRA attached, on the device and in the dtype it trains in.
        factors: per canonical weight name, ``SVDEstimator.factors``.
        levels: ``(ffn, attention)`` sparsity of each layer.
        tokens: "all", or "context": tokens before the batch's earliest answer are sparse.
        multiple: kept channels are rounded up to a multiple of this.
        cut_gradients: the reference implementation's gradients, see above.
        fixed: channels to use instead of the predictor's.
    """
    shared = Shared()
    base: Any = model.get_base_model()  # type: ignore[operator]
    placed = {name: _placed(pair, model) for name, pair in factors.items()}
    for i, (layer, (ffn, attention)) in enumerate(zip(base.model.layers, levels, strict=True)):
        common = {"shared": shared, "cut": cut_gradients, "multiple": multiple}
        if ffn:
            name = f"model.layers.{i}.mlp"
            known = _fixed(fixed, f"layers.{i}.mlp")
            mlp = SparseMLP(layer.mlp, _under(placed, name), ffn, known, **common)
            shared.swap(layer.mlp, mlp)
        if attention:
            name = f"model.layers.{i}.self_attn"
            known = _fixed(fixed, f"layers.{i}.self_attn")
            SparseAttention(
                layer.self_attn, _under(placed, name), attention, known, **common
            ).swap_in()
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        shared.split = _split(kwargs["labels"]) if tokens == "context" else None
        return inner(*args, **kwargs)

    shared.swap(model, forward)
    return shared


def _split(labels: Tensor) -> int:
    """The first token, over all samples, whose prediction carries loss."""
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = places.masked_fill(labels == -100, labels.shape[1]).amin()
    return max(int(first.item()) - 1, 0)


def _placed(pair: Factors, model: nn.Module) -> Factors:
    like = next(p for p in model.parameters() if not p.requires_grad)
    return pair[0].to(like), pair[1].to(like)


def _under(factors: Mapping[str, Factors], prefix: str) -> dict[str, Factors]:
    """Factors below a module, by the last part of their names."""
    parts = {name: pair for name, pair in factors.items() if f"{prefix}." in name}
    return {name.split(f"{prefix}.")[-1].split(".")[0]: pair for name, pair in parts.items()}


def _fixed(fixed: Fixed | None, suffix: str) -> Mapping[str, Tensor] | None:
    if fixed is None:
        return None
    return next(channels for name, channels in fixed.items() if name.endswith(suffix))


def _top(scores: Tensor, sparsity: float, multiple: int) -> Tensor:
    kept = kept_channels(scores.shape[0], sparsity, multiple)
    return torch.topk(scores, kept, sorted=False).indices.sort().values


def _parts(layer: nn.Module) -> tuple[nn.Linear, list[tuple[nn.Module, nn.Module, float]]]:
    """The frozen linear, and dropout-free LoRA branches ``(A, B, scale)`` of a projection."""
    held: Any = layer
    if isinstance(layer, nn.Linear):
        return layer, []
    names = [name for name in held.active_adapters if name in held.lora_A]
    branches = [
        (nn.Sequential(held.lora_dropout[n], held.lora_A[n]), held.lora_B[n], held.scaling[n])
        for n in names
    ]
    return held.base_layer, branches


def _lora(x: Tensor, branches: list[tuple[nn.Module, nn.Module, float]], out: Tensor) -> Tensor:
    """Add the branches, each in the dtype of its own matrices, as PEFT does: adapters in fp32 on a
    base in bf16."""
    dtype = out.dtype
    for a, b, scale in branches:
        out = torch.add(out, b(a(x.to(b.weight.dtype))), alpha=scale)
    return out.to(dtype)


def produce(layer: nn.Module, x: Tensor, rows: Tensor | None, cut: bool) -> Tensor:
    """A projection of which only some output channels are computed.

    Full width if it has a LoRA branch or bias (others are zero in the frozen part), else ``[B, L,
    S]``.
    """
    linear, branches = _parts(layer)
    if rows is None:
        return _lora(x, branches, linear(x))
    out = F.linear(x, linear.weight[rows])
    if branches or linear.bias is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cut):
            full = out.new_zeros(*out.shape[:-1], linear.out_features)
            out = full.scatter(-1, rows.expand_as(out), out)
        out = out if linear.bias is None else out + linear.bias
    return _lora(x, branches, out)


def consume(layer: nn.Module, h: Tensor, columns: Tensor | None, cut: bool) -> Tensor:
    """A projection that reads only some input channels; h is at full width, or just those."""
    linear, branches = _parts(layer)
    if columns is None:
        return _lora(h, branches, linear(h))
    kept = h
    if h.shape[-1] == linear.in_features:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cut):
            kept = torch.gather(h, -1, columns.expand(*h.shape[:-1], -1))
    out = F.linear(kept, linear.weight[:, columns], linear.bias)
    return _lora(h, branches, out)


@dataclass
class SparseMLP:
    """The forward of a gated MLP: whole for context tokens and whole for output tokens."""

    mlp: Any
    factors: dict[str, Factors]
    sparsity: float
    fixed: Mapping[str, Tensor] | None
    shared: Shared
    cut: bool
    multiple: int

    def __call__(self, x: Tensor) -> Tensor:
        channels = self._choose(x)
        at = self.shared.split
        if at is None:
            return self._block(x, channels)
        context = self._block(x[:, :at].contiguous(), channels)
        return torch.cat([context, self._block(x[:, at:].contiguous(), None)], dim=1)

    def _block(self, x: Tensor, channels: Tensor | None) -> Tensor:
        mlp, cut = self.mlp, self.cut
        gate, up = (produce(p, x, channels, cut) for p in (mlp.gate_proj, mlp.up_proj))
        return consume(mlp.down_proj, mlp.act_fn(gate) * up, channels, cut)

    @torch.no_grad()
    def _choose(self, x: Tensor) -> Tensor:
        if self.fixed is not None:
            return self.fixed["ffn"].to(x.device)
        pooled = x.mean(dim=1)
        gate, up = (
            F.linear(F.linear(pooled, b), a)
            for a, b in (self.factors["gate_proj"], self.factors["up_proj"])
        )
        return _top((self.mlp.act_fn(gate) * up).norm(dim=0), self.sparsity, self.multiple)


@dataclass
class SparseAttention:
    """Forwards of an attention's four projections. The first that runs, q, chooses for all."""

    attention: Any
    factors: dict[str, Factors]
    sparsity: float
    fixed: Mapping[str, Tensor] | None
    shared: Shared
    cut: bool
    multiple: int
    rows: dict[str, Tensor] = field(default_factory=dict)

    def swap_in(self) -> None:
        """Swap all four projections."""
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer = getattr(self.attention, name)
            self.shared.swap(layer, _Projection(self, layer, name))

    @torch.no_grad()
    def choose(self, x: Tensor) -> None:
        """Channels of queries with keys, and of values with the output, for this step."""
        dim, group = self.attention.head_dim, self.attention.num_key_value_groups
        if self.fixed is not None:
            qk, v = (self.fixed[name].to(x.device) for name in ("qk", "v"))
        else:
            flat = x.flatten(0, 1)
            norms = {
                n: F.linear(F.linear(flat, b), a).norm(dim=0) for n, (a, b) in self.factors.items()
            }
            query = norms["q_proj"].view(-1, group, dim).mean(dim=1).flatten()
            qk = _top(query * norms["k_proj"], self.sparsity, self.multiple)
            v = _top(norms["v_proj"], self.sparsity, self.multiple)
        self.rows = {
            "q_proj": _queries(qk, dim, group), "k_proj": qk,
            "v_proj": v, "o_proj": _queries(v, dim, group),
        }  # fmt: skip


def _queries(channels: Tensor, dim: int, group: int) -> Tensor:
    """The channels of every query head that shares a kv head: ``[S] -> [G * S]``."""
    head, inside = channels // dim, channels % dim
    heads = head * group + torch.arange(group, device=channels.device)[:, None]
    return (heads * dim + inside).flatten()


@dataclass
class _Projection:
    owner: SparseAttention
    layer: nn.Module
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        owner = self.owner
        if self.name == "q_proj":
            owner.choose(x)
        rows, at = owner.rows[self.name], owner.shared.split
        run = consume if self.name == "o_proj" else produce
        if at is None:
            return run(self.layer, x, rows, owner.cut)
        context = run(self.layer, x[:, :at].contiguous(), rows, owner.cut)
        return torch.cat([context, run(self.layer, x[:, at:].contiguous(), None, owner.cut)], dim=1)
