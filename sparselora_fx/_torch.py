"""The one file that touches torch's private APIs. Functions say which versions they ran on."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx

from sparselora_fx import ops, scores
from sparselora_fx.ops import OPS

BACKENDS = ("inductor", "aot_eager", "eager")
# Versions of torch whose Inductor the lowerings were written for.
KNOWN_VERSIONS = ("2.11", "2.12", "2.13", "2.14")
# A phase, a token-length class and a plan level each make a graph; torch's default is 8.
_RECOMPILES = 256

# On a CPU a kernel that places rows and channels is scalar code. Inlined in each of its readers (a
# rotation reads it three times) it costs more than a pass over memory. Torch's default is 30; with
# 8 a step of the preset cpu-small took 1.105 s instead of 1.119 (medians of 11, in turns).
_ON_CPU: dict[str, Any] = {"realize_opcount_threshold": 8}

# Ops that Inductor sees through, and fuses: pointwise work, gathers and small reductions.
_DECOMPOSED = (
    "gather_channels", "scatter_channels", "channel_rows", "topk_channels", "pool_tokens",
    "take_tokens", "unplace_tokens", "place_tokens", "merge_tokens", "sample_tokens",
    "channel_energy", "low_rank_energy", "low_rank_norms",
)  # fmt: skip
# Ops with lowerings of their own; decomposed too where those cannot be installed.
_LOWERED = ("sliced_linear", "sliced_linear_dgrad", "sliced_linear_in", "sliced_linear_in_dgrad")


def compile_callable(
    fn: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile(fn)`` that may hold more graphs than by default: one per phase and level."""
    options: dict[str, Any] = {"backend": backend, "dynamic": dynamic}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILES
        return torch.compile(fn, **options)
    compiled = torch.compile(fn, **options)

    def limited(*args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.config as dynamo_config

        with dynamo_config.patch(recompile_limit=_RECOMPILES):
            return compiled(*args, **kwargs)

    return limited


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread. Run on 2.13."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way in this thread. Run on 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def mark_dynamic(tensor: torch.Tensor) -> None:
    """Let the first dimension vary without a recompile, where the compiler can."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def python_dispatcher() -> AbstractContextManager[None]:
    """Run ops on fake tensors as Dynamo and AOTAutograd do: without it, an op that is composed of
    others in C++ (``pad``) asks symbolic sizes for integers there, which fixes them. Run on 2.13.
    """
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def recompile_reason() -> str:
    """Why the graph that is compiled now did not fit those compiled before, in torch's words; ""
    for a first one. Run on 2.13."""
    from torch._dynamo.utils import get_metrics_context

    return str(get_metrics_context()._metrics.get("recompile_reason") or "")


def refused_compilations() -> int:
    """How often torch has left a function uncompiled, in this process, as it was compiled too often
    before. Run on 2.13."""
    from torch._dynamo.utils import counters

    said = counters["unimplemented"].items()
    return sum(count for words, count in said if "recompile limit" in words)


def backend_compile(
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    rewritten: bool,
    patches: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph as ``torch.compile(backend=name)`` would.

    A rewritten graph also gets our lowerings, and a cache key that covers them. ``patches`` are
    further settings of Inductor for it.
    """
    if name == "inductor" and rewritten:
        from torch._inductor.compile_fx import compile_fx

        compiler: Any = compile_fx  # its annotation covers ahead-of-time uses too
        on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))
        settings = {**(_ON_CPU if on_cpu else {}), **(patches or {})}
        with saving_less(), donating_nothing():
            if not install_lowerings():
                return compiler(gm, inputs, decompositions=_all_decomposed())  # type: ignore[no-any-return]
            settings["post_grad_custom_pre_pass"] = _key_pass()
            return compiler(gm, inputs, config_patches=settings)  # type: ignore[no-any-return]
    from torch._dynamo.backends.registry import lookup_backend

    with donating_nothing() if rewritten else nullcontext():
        return lookup_backend(name)(gm, list(inputs))


def saving_less() -> AbstractContextManager[None]:
    """Let a backward compute cheap values again also where a matmul or attention reads them: scaled
    rows of a norm, keys repeated for their query heads. Run on 2.11 and 2.13."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(ban_recompute_materialized_backward=False)  # type: ignore[no-any-return]


@contextmanager
def donating_nothing() -> Iterator[None]:
    """Let a backward run twice (``retain_graph=True``) through a graph with symbolic sizes.

    Torch compiles such a backward together with the forward, before it can know, and lets it write
    into what was saved (at most one buffer of memory at a time). Token lists make every graph of
    ours one of these, also where plain ``torch.compile`` sees fixed sizes. Run on 2.13.
    """
    from torch._functorch._aot_autograd import graph_compile

    with mock.patch.object(graph_compile, "collect_bw_donated_buffer_idxs", return_value=[]):
        yield


def _body(name: str) -> Callable[..., Any]:
    return getattr(ops, name, None) or getattr(scores, name)  # type: ignore[no-any-return]


def _all_decomposed() -> dict[Any, Callable[..., Any]]:
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
    from sparselora_fx import lowering

    version = ".".join(torch.__version__.split(".")[:2])
    if version in KNOWN_VERSIONS:
        try:
            lowering.install()
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


@cache
def inductor() -> SimpleNamespace:
    """What the lowerings use of Inductor, by its own names; it costs seconds. Run on 2.13."""
    from torch._inductor import config, ir, lowering
    from torch._inductor.kernel.mm_common import acc_type
    from torch._inductor.select_algorithm import (
        ExternKernelChoice,
        SymbolicGridFn,
        TritonTemplate,
        autotune_select_algorithm,
        realize_inputs,
    )
    from torch._inductor.utils import use_triton_template
    from torch._inductor.virtualized import V

    return SimpleNamespace(
        config=config,
        lowerings=lowering.lowerings,
        register_lowering=lowering.register_lowering,
        FixedLayout=ir.FixedLayout,
        ExternKernelChoice=ExternKernelChoice,
        SymbolicGridFn=SymbolicGridFn,
        TritonTemplate=TritonTemplate,
        autotune_select_algorithm=autotune_select_algorithm,
        realize_inputs=realize_inputs,
        acc_type=acc_type,
        use_triton_template=use_triton_template,
        V=V,
    )


def select(
    name: str, choices: list[Any], inputs: list[Any], layout: Any, input_gen_fns: Any
) -> Any:
    """The fastest of some choices, as an IR node. 2.12 and 2.13 return ``(node, choice)``."""
    found = inductor().autotune_select_algorithm(
        name, choices, inputs, layout, input_gen_fns=input_gen_fns
    )
    return found[0] if isinstance(found, tuple) else found


def only_choices(name: str) -> dict[str, Any]:
    """Settings with which Inductor benchmarks matmuls, and only those choices whose names match a
    regular expression. Run on 2.13."""
    return {"max_autotune_gemm": True, "test_configs.autotune_choice_name_regex": name}


def fallback(op: Any) -> Callable[..., Any]:
    """A lowering that calls an op's eager kernel, on inputs with the strides that were traced. Run
    on 2.13."""
    from torch._inductor.lowering import (
        add_layout_constraint,
        constrain_to_fx_strides,
        fallback_handler,
    )

    add_layout_constraint(op, constrain_to_fx_strides)
    return fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-any-return]


def size_hint(expression: Any) -> int:
    """A likely value of a size that may be symbolic. Run on 2.11, 2.12 and 2.13."""
    return int(inductor().V.graph.sizevars.optimization_hint(expression))


def always_equal(left: Any, right: Any) -> bool:
    """Whether two sizes are equal whatever their symbols stand for; adds no guard."""
    import sympy  # type: ignore[import-untyped]

    return bool(inductor().V.graph.sizevars.statically_known_true(sympy.Eq(left, right)))


def traced_size(size: torch.SymInt) -> int:
    """What a size was in the call that is traced; adds no guard. Run on 2.13."""
    return int(size.node.hint)


def divides(divisor: int, size: Any) -> bool:
    """Whether a size is a multiple of ``divisor`` whatever its symbols stand for; adds no guard."""
    return always_equal(size % divisor, 0)


def _key_pass() -> Any:
    """A pass that changes nothing but Inductor's cache key, which does not cover lowerings.

    It runs the user's own ``post_grad_custom_pre_pass`` (one or several), under a key that holds
    both. Run on 2.13.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    from sparselora_fx import lowering

    theirs: Any = config.post_grad_custom_pre_pass or ()
    theirs = tuple(theirs) if isinstance(theirs, list | tuple) else (theirs,)
    key = lowering.key()

    class LoweringKey(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for step in theirs:
                step(graph)

        def uuid(self) -> Any:
            keys = [step.uuid() if hasattr(step, "uuid") else None for step in theirs]
            return None if None in keys else (key, *keys)  # None: Inductor does not cache

    return LoweringKey()


def storage_key(tensor: torch.Tensor) -> int:
    """What a tensor and its views have in common, fake or not. Torch 2.11 to 2.13."""
    return int(tensor.untyped_storage()._cdata)
