"""Which tokens of a batch are sparse: counted eagerly, once a step, outside the compiled region.

The dense tokens are those whose *prediction* carries loss. A causal model predicts label t+1 from
token t (transformers shifts the labels inside the loss), so token t is dense when
``labels[t + 1] != -100``; the last answer token predicts nothing and is context. A masked model
predicts label t at token t. Of a loss that nobody has seen, both are taken to count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparselora_fx.errors import PlanError
from sparselora_fx.ir.token_lists import Tokens, carry_loss
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS, checked


def split_tokens(
    plan: SparsityPlan, arguments: Mapping[str, object], *, shift: bool | None
) -> Tokens | None:
    """Apply a plan's token policy to one call; None when the call has no token grid ``[B, L]``.

    Args:
        plan: its ``tokens``, ``sink_tokens`` and ``sparse_outputs``.
        arguments: the call's, by name: ``input_ids`` or ``inputs_embeds`` give the grid,
            ``attention_mask[B, L]`` the padding (either side), ``labels[B, L]`` (or
            ``shift_labels[B, L]``, at the token that predicts each) the output tokens,
            ``position_ids[B, L]`` or ``cu_seq_lens[S + 1]`` the starts of packed samples;
            ``output_tokens``: bool[B, L], the output tokens by name, whatever the labels say.
        shift: labels are predicted one token earlier (causal models); None: not known, a token is
            dense if its own label or the next one counts.
    """
    grid = token_grid(arguments)
    if grid is None:
        return None
    shown, masked = _shown(grid, arguments.get("attention_mask"))
    labelled, named = _labelled(arguments, grid, shift), arguments.get(OUTPUT_TOKENS)
    predicting = labelled if named is None else checked(named, grid)
    # Also where the mask hides the token: behind padding on the left the first label is predicted
    # by a padding token, and the loss reads that prediction.
    real = shown if predicting is None or not masked else shown | predicting
    dense, split = None, False
    if callable(plan.tokens):
        dense, split = real & ~_user_mask(plan.tokens, arguments, real), True
    elif plan.tokens == "context" and predicting is not None:
        dense, split = predicting, True
    if plan.sparse_outputs and dense is not None:
        count = dense.cumsum(dim=1) * plan.sparse_outputs
        dense = dense & ~(count.floor() > (count - plan.sparse_outputs).floor())
    if plan.sink_tokens:
        sinks = shown & (_places(shown, arguments) < plan.sink_tokens)
        dense, split = sinks if dense is None else dense | sinks, True
    dense = torch.zeros_like(real) if dense is None else dense
    # real & ~dense; never the caller's own mask: a graph would be given one tensor twice.
    sparse = real > dense
    if split and real is not shown:
        # What a padding token attends to is the model's affair: padding, perhaps. Where one
        # predicts a label, none can be left out: all that is not sparse is dense.
        dense = torch.where((real > shown).any(), ~sparse, dense)
    return Tokens(sparse, dense, split, not masked, labelled)


def _labelled(arguments: Mapping[str, object], grid: Tensor, shift: bool | None) -> Tensor | None:
    """The tokens ``bool[B, L]`` whose prediction carries loss; None for a call without labels.
    transformers' losses take ``shift_labels`` before ``labels``, where they are given."""
    shifted = arguments.get("shift_labels")
    if isinstance(shifted, Tensor) and shifted.shape == grid.shape:
        return carry_loss(shifted.to(grid.device), shift=False)
    labels = arguments.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != grid.shape:
        return None
    return carry_loss(labels.to(grid.device), shift=shift)


def token_grid(arguments: Mapping[str, object]) -> Tensor | None:
    """A tensor of the shape ``[B, L]`` of a call's tokens, on their device; None without any."""
    grid = arguments.get("input_ids")
    if not isinstance(grid, Tensor):
        embeds = arguments.get("inputs_embeds")
        grid = embeds[..., 0] if isinstance(embeds, Tensor) and embeds.dim() == 3 else None
    if grid is None:
        grid = arguments.get(OUTPUT_TOKENS)
    return grid if isinstance(grid, Tensor) and grid.dim() == 2 else None


def _shown(grid: Tensor, mask: object) -> tuple[Tensor, bool]:
    """Which tokens are no padding, ``bool[B, L]``, and whether a mask says so."""
    if isinstance(mask, Tensor) and mask.shape == grid.shape:
        return mask.to(device=grid.device, dtype=torch.bool), True
    return torch.ones(grid.shape, dtype=torch.bool, device=grid.device), False


def _places(real: Tensor, arguments: Mapping[str, object]) -> Tensor:
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
    policy: Callable[[dict[str, object]], object], arguments: Mapping[str, object], real: Tensor
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
