"""The one file that touches torch's private APIs. Each function says which versions it was run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from sparselora_fx import ops
from sparselora_fx.ops import OPS

BACKENDS = ("inductor", "aot_eager", "eager")
_RECOMPILES = 256  # a phase, a token-length class and a plan level each make a graph; torch's default is 8

# Ops that Inductor sees through: their eager bodies are pointwise, gathers and small reductions, which it fuses.
_DECOMPOSED = (
    "gather_channels", "scatter_channels", "channel_rows", "topk_channels", "pool_tokens", "low_rank_norms",
)  # fmt: skip


def compile_callable(
    fn: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile(fn)`` that may hold more graphs than the default limit (one per phase, level and length class)."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(fn, backend=backend, dynamic=dynamic, recompile_limit=_RECOMPILES)
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic)

    def limited(*args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.config as dynamo_config

        with dynamo_config.patch(recompile_limit=_RECOMPILES):
            return compiled(*args, **kwargs)

    return limited


def backend_compile(
    name: str, gm: fx.GraphModule, inputs: Sequence[Any], *, rewritten: bool
) -> Callable[..., Any]:
    """Compile a Dynamo graph as ``torch.compile(backend=name)`` would; a rewritten graph also gets our lowerings."""
    if name == "inductor" and rewritten:
        from torch._inductor.compile_fx import compile_fx

        install_lowerings()
        return compile_fx(gm, inputs, decompositions=_decompositions())  # type: ignore[no-any-return]
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)(gm, inputs)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    for name in _DECOMPOSED:
        table[getattr(OPS, name).default] = getattr(ops, name)
    return table


@cache
def install_lowerings() -> None:
    """Teach Inductor the sliced matmuls: one gather of the kept rows, then its own matmul. Idempotent."""
    from torch._inductor.lowering import lowerings, register_lowering

    aten = torch.ops.aten

    def rows(w: Any, idx: Any, dtype: Any) -> Any:
        kept = lowerings[aten.index_select.default](w, 0, idx) if _has(aten.index_select) else None
        if kept is None:
            kept = lowerings[aten.index.Tensor](w, [idx])
        return lowerings[torch.ops.prims.convert_element_type.default](kept, dtype)

    def _has(packet: Any) -> bool:
        return packet.default in lowerings

    def transpose(w: Any) -> Any:
        return lowerings[aten.permute.default](w, [1, 0])

    def product(x: Any, w: Any) -> Any:
        """``x[..., K] @ w[K, N]`` through the 2-D matmul lowering."""
        *lead, k = x.get_size()
        flat = lowerings[aten.view.default](x, [-1, k]) if len(lead) != 1 else x
        out = lowerings[aten.mm.default](flat, w)
        return lowerings[aten.view.default](out, [*lead, w.get_size()[1]]) if len(lead) != 1 else out

    def register(name: str, fn: Callable[..., Any]) -> None:
        register_lowering(getattr(OPS, name).default, type_promotion_kind=None)(fn)

    register("sliced_linear", lambda x, w, i: product(x, transpose(rows(w, i, x.get_dtype()))))
    register("sliced_linear_dgrad", lambda g, w, i: product(g, rows(w, i, g.get_dtype())))
    register("sliced_linear_in", lambda h, w, i: product(h, rows(transpose(w), i, h.get_dtype())))
    register(
        "sliced_linear_in_dgrad",
        lambda g, w, i: product(g, transpose(rows(transpose(w), i, g.get_dtype()))),
    )
