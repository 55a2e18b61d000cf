"""Which tokens of a batch are sparse: counted eagerly, once a step, outside the compiled region.

The dense tokens are those whose *prediction* carries loss. A causal model predicts label t+1 from
token t (transformers shifts the labels inside the loss), so token t is dense when
``labels[t + 1] != -100``; the last answer token predicts nothing and is context. A masked model
predicts label t at token t. Of a loss that nobody has seen, both are taken to count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparselora_fx._torch import mark_dynamic
from sparselora_fx.errors import PlanError
from sparselora_fx.named_tokens import OUTPUT_TOKENS, checked
from sparselora_fx.plan import SparsityPlan

IGNORED = -100  # the label that carries no loss, as in torch.nn.functional.cross_entropy
_ROUND = 16  # token lists grow in steps of this, so that their matmuls stay aligned


@dataclass(frozen=True)
class Tokens:
    """``sparse`` and ``dense``: disjoint ``bool[B, L]``; tokens of neither are padding. With
    ``split`` they are treated apart; ``padded``: there is, or was, padding to tell from them."""

    sparse: Tensor
    dense: Tensor
    split: bool
    padded: bool = False

    def tensors(self) -> list[Tensor]:
        """What a site marker carries: the counted tokens, then (if split) the lists of sparse and
        of dense tokens, each with its inverse, and then (if padded) those of all but padding and of
        all but sparse tokens.

        A list is ``int64[P]`` of flat token indices, padded with -1; its inverse is
        ``int64[B, L]``. Lists are as long as no other size of the batch, lest the compiler take two
        sizes for one because they agree this once.
        """
        return [self.sparse, *(self._lists() if self.split else [])]

    def _lists(self) -> list[Tensor]:
        taken: set[int] = set()
        masks = [self.sparse, self.dense]
        masks += [self.sparse | self.dense, ~self.sparse] if self.padded else []
        return [tensor for mask in masks for tensor in _token_list(mask, taken)]

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many tokens are sparse, and how many dense: one read of the device, kept."""
        sparse, dense = torch.stack([self.sparse.sum(), self.dense.sum()]).tolist()
        return int(sparse), int(dense)

    def has_padding(self) -> bool:
        """Whether some token is neither sparse nor dense."""
        return not bool((self.sparse | self.dense).all())

    def label_list(self, labels: Tensor, known: list[Tensor], *, shift: bool) -> list[Tensor]:
        """The list of tokens whose prediction carries loss, with its inverse.

        ``known`` is what `tensors` returned: if the dense tokens are just those, their list is
        used, so that the compiler sees one list.
        """
        rows = _predicting(labels.to(self.sparse.device), shift=shift)
        if self.split and torch.equal(rows, self.dense):
            return known[3:5]
        return _token_list(rows, {tensor.shape[0] for tensor in known[1::2]})


def _token_list(mask: Tensor, taken: set[int]) -> list[Tensor]:
    """The flat indices of a ``bool[B, L]`` mask, padded with -1, and their inverse ``int64[B, L]``.

    Its length is none of ``taken`` and is added to it.
    """
    batch, length = mask.shape
    idx = mask.flatten().nonzero().flatten()
    pos = torch.full((batch * length,), -1, dtype=torch.int64, device=mask.device)
    pos[idx] = torch.arange(idx.shape[0], device=mask.device)
    size = max(_ROUND, -(-idx.shape[0] // _ROUND) * _ROUND)
    while size in taken | {0, 1, batch, length, batch * length}:
        size += _ROUND // 2  # rows of a list are computed, read or not: no more than needed
    taken.add(size)
    idx = torch.nn.functional.pad(idx, (0, size - idx.shape[0]), value=-1)
    mark_dynamic(idx)
    return [idx, pos.view(batch, length)]


def call_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, as far as the signature of ``forward`` names them."""
    names = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def split_tokens(
    plan: SparsityPlan, arguments: Mapping[str, Any], *, shift: bool | None
) -> Tokens | None:
    """Apply a plan's token policy to one call; None when the call has no token grid ``[B, L]``.

    Args:
        plan: its ``tokens``, ``sink_tokens`` and ``sparse_outputs``.
        arguments: the call's, by name: ``input_ids`` or ``inputs_embeds`` give the grid,
            ``attention_mask[B, L]`` the padding (either side), ``labels[B, L]`` the output tokens,
            ``position_ids[B, L]`` or ``cu_seq_lens[S + 1]`` the starts of packed samples;
            ``output_tokens``: bool[B, L], the output tokens by name, whatever the labels say.
        shift: labels are predicted one token earlier (causal models); None: not known, a token is
            dense if its own label or the next one counts.
    """
    grid = _grid(arguments)
    if grid is None:
        return None
    mask = arguments.get("attention_mask")
    shown = torch.ones(grid.shape, dtype=torch.bool, device=grid.device)
    if isinstance(mask, Tensor) and mask.shape == grid.shape:
        shown = mask.to(device=grid.device, dtype=torch.bool)
    labels, named = arguments.get("labels"), arguments.get(OUTPUT_TOKENS)
    labelled = named is not None or (isinstance(labels, Tensor) and labels.shape == grid.shape)
    predicting = torch.zeros_like(shown)
    if named is not None:
        predicting = checked(named, grid)
    elif isinstance(labels, Tensor) and labelled:
        # Also where the mask hides the token: behind padding on the left the first label is
        # predicted by a padding token, and the loss reads that prediction.
        predicting = _predicting(labels.to(grid.device), shift=shift)
    real = shown | predicting
    dense = torch.zeros_like(real)
    split = callable(plan.tokens)
    if callable(plan.tokens):
        dense = real & ~_user_mask(plan.tokens, arguments, real)
    if plan.tokens == "context" and labelled:
        dense = predicting
        split = True
    if plan.sparse_outputs:
        count = dense.cumsum(dim=1) * plan.sparse_outputs
        dense = dense & ~(count.floor() > (count - plan.sparse_outputs).floor())
    if plan.sink_tokens:
        dense = dense | (shown & (_places(shown, arguments) < plan.sink_tokens))
        split = True
    sparse = real & ~dense
    if split:
        # What a padding token attends to is the model's affair: padding, perhaps. Where one
        # predicts a label, none can be left out.
        dense = dense | (~real & (real & ~shown).any())
    return Tokens(sparse, dense, split)


def _grid(arguments: Mapping[str, Any]) -> Tensor | None:
    grid = arguments.get("input_ids")
    if not isinstance(grid, Tensor):
        embeds = arguments.get("inputs_embeds")
        grid = embeds[..., 0] if isinstance(embeds, Tensor) and embeds.dim() == 3 else None
    if grid is None:
        grid = arguments.get(OUTPUT_TOKENS)
    return grid if grid is not None and grid.dim() == 2 else None


def _predicting(labels: Tensor, *, shift: bool | None) -> Tensor:
    carries = labels != IGNORED
    if shift is False:
        return carries
    before = torch.nn.functional.pad(carries[:, 1:], (0, 1), value=False)
    return before if shift else before | carries


def _places(real: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Place of each token in its sample. Packed samples begin where ``position_ids`` restart or, in
    a batch of one row, where ``cu_seq_lens`` (``cu_seq_lens_q``) says."""
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == real.shape:
        return positions.to(real.device)
    starts = arguments.get("cu_seq_lens_q", arguments.get("cu_seq_lens"))
    if isinstance(starts, Tensor) and real.shape[0] == 1:
        starts = starts.to(real.device, torch.int64)
        tokens = torch.arange(real.shape[1], device=real.device)
        return (tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1])[None]
    return real.cumsum(dim=1) - 1


def _user_mask(
    policy: Callable[[dict[str, Any]], Any], arguments: Mapping[str, Any], real: Tensor
) -> Tensor:
    mask = policy(dict(arguments))
    if not isinstance(mask, Tensor) or mask.shape != real.shape or mask.dtype != torch.bool:
        got = (
            f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        )
        raise PlanError(
            f"the plan's tokens function returned {got}; it must return a bool tensor of shape "
            f"{tuple(real.shape)}, true where a token may be sparse"
        )
    return mask.to(real.device)
