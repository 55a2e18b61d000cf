"""Compile a graph as a named backend of `torch.compile` does, with our lowerings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import fx

from sparselora_fx import environment
from sparselora_fx._torch import donating_nothing
from sparselora_fx.ir import ops, score_ops
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import cache_key, score_forms
from sparselora_fx.lowering.batch_topk import batch_topk
from sparselora_fx.lowering.install import install
from sparselora_fx.lowering.join_sliced import join_sliced

BACKENDS = ("inductor", "aot_eager", "eager")
# Versions of torch whose Inductor the lowerings were written for.
KNOWN_VERSIONS = ("2.11", "2.12", "2.13", "2.14")
# On a CPU a kernel that places rows and channels is scalar code. Inlined in each of its readers (a
# rotation reads it three times) it costs more than a pass over memory. Torch's default is 30; with
# 8 a step of the preset cpu-small took 1.105 s instead of 1.119 (medians of 11, in turns).
_ON_CPU: dict[str, object] = {"realize_opcount_threshold": 8}
# On a GPU independent kernels (of predictors, of the two token lists, casts of adapters) share a
# launch: with 8B shapes the forward of a block went from 82 to 59 (`benchmarks.launches`). Torch
# bounds what that costs in memory from 2.13 on, by this setting.
_ON_GPU: dict[str, object] = {"combo_kernels": True}
_BOUND = "combo_kernel_peak_memory_pct_threshold"
# Ops that Inductor sees through, and fuses: pointwise work, gathers and small reductions. On a GPU
# `topk_channels` stays, for a lowering (`score_forms`).
_DECOMPOSED = (
    "gather_channels", "scatter_channels", "channel_rows", "topk_channels", "pool_tokens",
    "gather_tokens", "gather_or_zero_tokens", "scatter_tokens", "scatter_two_lists",
    "sample_tokens",
    "channel_energy", "low_rank_energy", "low_rank_linear", "low_rank_norms",
)  # fmt: skip
# Ops with lowerings of their own; decomposed too where those cannot be installed.
_LOWERED = ("sliced_linear", "sliced_linear_dgrad", "sliced_linear_in", "sliced_linear_in_dgrad")


def backend_compile(
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[object],
    *,
    rewritten: bool,
    patches: Mapping[str, object] | None = None,
) -> Callable[..., object]:
    """Compile a Dynamo graph as ``torch.compile(backend=name)`` would.

    A rewritten graph also gets our lowerings, and a cache key that covers them. ``patches`` are
    further settings of Inductor for it.
    """
    if name == "inductor" and rewritten:
        from torch._inductor.compile_fx import compile_fx

        # Its annotation covers ahead-of-time uses too.
        compiler = cast(Callable[..., Callable[..., object]], compile_fx)
        devices = {x.device.type for x in inputs if isinstance(x, torch.Tensor)} - {"cpu"}
        settings = {**settings_for(next(iter(devices), "cpu")), **(patches or {})}
        with saving_less(), donating_nothing(), backward_at_once():
            if not install_lowerings():
                return compiler(gm, inputs, decompositions=_all_decomposed())
            settings["post_grad_custom_pre_pass"] = graph_pass()
            return compiler(gm, inputs, config_patches=settings)
    from torch._dynamo.backends.registry import lookup_backend

    with donating_nothing() if rewritten else nullcontext():
        compiler = cast(Callable[..., Callable[..., object]], lookup_backend(name))  # sizes too
        return compiler(gm, list(inputs))


def settings_for(device: str) -> dict[str, object]:
    """Inductor's settings for rewritten graphs on a kind of device, where they are not its own."""
    if device == "cpu":
        return dict(_ON_CPU)
    from torch._inductor import config

    on = (
        torch.version.hip is None
        and hasattr(config, _BOUND)
        and environment.shares_launches(device)
    )
    return dict(_ON_GPU) if on else {}


def saving_less() -> AbstractContextManager[None]:
    """Let a backward compute cheap values again also where a matmul or attention reads them: scaled
    rows of a norm, keys repeated for their query heads. Run on 2.11 and 2.13."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(ban_recompute_materialized_backward=False)  # type: ignore[no-any-return]


def backward_at_once() -> AbstractContextManager[None]:
    """Compile a backward together with its forward, and let it fail there: in the backward, no step
    can be taken dense any more. Read on 2.13."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(force_non_lazy_backward_lowering=True)  # type: ignore[no-any-return]


def _body(name: str) -> Callable[..., object]:
    """What an op is decomposed to: its body, if it has no other form here."""
    rooms = (score_forms, ops, score_ops)
    found = next(getattr(room, name) for room in rooms if hasattr(room, name))
    return found  # type: ignore[no-any-return]


def _all_decomposed() -> dict[object, Callable[..., object]]:
    """Inductor's decompositions and those of all our ops. Inductor does not cache with such a
    table."""
    from torch._inductor.decomposition import select_decomp_table

    ours = {getattr(OPS, name).default: _body(name) for name in _DECOMPOSED + _LOWERED}
    return {**select_decomp_table(), **ours}


def _register_decompositions() -> None:
    """Add the ops that Inductor sees through to its own table.

    A table that is passed to ``compile_fx`` would do as well, but with one Inductor finds no stable
    cache key (2.13) and compiles every graph anew in every process.
    """
    from torch._inductor import decomposition

    for name in _DECOMPOSED:
        decomposition.decompositions[getattr(OPS, name).default] = _body(name)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table


@cache
def install_lowerings() -> bool:
    """Give Inductor the lowerings of the sliced matmuls.

    Returns False, with one warning, for a torch that we do not know.
    """
    version = ".".join(torch.__version__.split(".")[:2])
    if version in KNOWN_VERSIONS:
        try:
            install()
            _register_decompositions()
            return True
        except (ImportError, AttributeError) as error:
            why = f"its Inductor lacks something the lowerings need ({error})"
    else:
        why = f"the lowerings were written for {', '.join(KNOWN_VERSIONS)}"
    warnings.warn(
        f"torch {torch.__version__}: {why}; sliced matmuls are compiled as gather + matmul instead."
        " Results are the same, speed may not be.",
        stacklevel=2,
    )
    return False


def graph_pass() -> object:
    """Our passes over graphs of aten ops (`batch_topk`, `join_sliced`), and Inductor's cache key
    for our lowerings, which its own does not cover.

    It runs the user's own ``post_grad_custom_pre_pass`` (one or several), under a key that holds
    both. Run on 2.13.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    theirs: Any = config.post_grad_custom_pre_pass or ()
    theirs = tuple(theirs) if isinstance(theirs, list | tuple) else (theirs,)
    key = cache_key.key()

    class AfterAutograd(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for step in theirs:
                step(graph)
            batch_topk(graph)
            join_sliced(graph)

        def uuid(self) -> object:
            keys = [step.uuid() if hasattr(step, "uuid") else None for step in theirs]
            return None if None in keys else (key, *keys)  # None: Inductor does not cache

    return AfterAutograd()
