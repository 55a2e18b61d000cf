"""What activation checkpointing keeps of a rewritten graph: the chosen channels."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparselora_fx.ops import OPS
from sparselora_fx.quiet import quieten


def save_selections(gm: fx.GraphModule) -> None:
    """Under activation checkpointing, save chosen channels: a backward that recomputes a block must
    not choose again. Blocks with a checkpoint policy of the user's own are left to it. Run on 2.13.
    """
    for body in gm.modules():
        if isinstance(body, fx.GraphModule) and body.graph.find_nodes(
            op="call_function", target=OPS.topk_channels.default
        ):
            body.meta.setdefault("_checkpoint_context_fn", _selection_contexts)
            quieten()


def _selection_contexts() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_save_selection)


_selection_contexts.cache_hash = "sparselora_fx: selections"  # type: ignore[attr-defined]


def _save_selection(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    chosen = op is OPS.topk_channels.default
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE
