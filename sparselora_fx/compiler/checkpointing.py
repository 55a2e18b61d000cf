"""Under activation checkpointing a backward runs a block again, and must not choose again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor, fx
from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sparselora_fx.ir.ops import OPS


def save_selections(gm: fx.GraphModule) -> None:
    """Save chosen channels in every checkpointed body of a graph. Bodies with a checkpoint policy
    of the user's own are left to it. Run on 2.13."""
    for body in gm.modules():
        if isinstance(body, fx.GraphModule) and body.graph.find_nodes(
            op="call_function", target=OPS.topk_channels.default
        ):
            body.meta.setdefault("_checkpoint_context_fn", _selection_contexts)
            quieten()


def _selection_contexts() -> object:
    """Contexts of a checkpointed forward and of its recomputation.

    While AOTAutograd traces they are torch's, which tag the nodes of the graph. A body that runs as
    it is (``backend="eager"``) gets ours: torch's let each forward be recomputed once only, and
    ``backward(retain_graph=True)`` recomputes it again.
    """
    if TracingContext.try_get() is not None:
        return create_selective_checkpoint_contexts(_save_selection)
    chosen: list[Tensor] = []
    return _Choosing(chosen), _ChoosingAgain(chosen)


_selection_contexts.cache_hash = "sparselora_fx: selections"  # type: ignore[attr-defined]


def _save_selection(context: object, op: object, *args: object, **kwargs: object) -> object:
    chosen = op is OPS.topk_channels.default
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


class _Choosing(TorchDispatchMode):
    """Keeps every choice of channels, in order."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code inside that is compiled on its own stays compiled, as under torch's contexts."""
        return True

    def __init__(self, chosen: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen = chosen

    def __torch_dispatch__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func is OPS.topk_channels.default:
            self.chosen.append(result)
        return result


class _ChoosingAgain(_Choosing):
    """Gives back, in the same order, what was chosen; each time it is entered from the start."""

    place = 0

    def __enter__(self) -> object:
        self.place = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is not OPS.topk_channels.default:
            return func(*args, **(kwargs or {}))
        self.place += 1
        return self.chosen[self.place - 1]


@cache
def quieten() -> None:
    """Drop torch's remark on the context function that saves selections: the user passed none."""
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_OurContexts())


class _OurContexts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
