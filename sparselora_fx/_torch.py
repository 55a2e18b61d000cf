"""What this package uses of torch's private APIs, but for those of Inductor (`lowering.inductor`).
Functions say which versions they ran on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import fx

# Each sparsity scale and each class of token-list lengths makes a graph; torch's default is 8.
_RECOMPILES = 256


def compile_callable(
    fn: Callable[..., object], backend: Callable[..., object], dynamic: bool | None
) -> Callable[..., object]:
    """``torch.compile(fn)`` that may hold more graphs than by default: one for each sparsity scale
    and class of list lengths."""
    options: dict[str, Any] = {"backend": backend, "dynamic": dynamic}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILES
        return torch.compile(fn, **options)
    compiled = torch.compile(fn, **options)

    def limited(*args: object, **kwargs: object) -> object:
        import torch._dynamo.config as dynamo_config

        with dynamo_config.patch(recompile_limit=_RECOMPILES):
            return compiled(*args, **kwargs)

    return limited


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread. Run on 2.13."""
    return bool(torch._C._current_graph_task_id() != -1)


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward that is under way in this thread has ended. Run on 2.13."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way in this thread. Run on 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_traced() -> bool:
    """Whether torch writes a structured log (``TORCH_TRACE``), which tlparse shows. Run on 2.13."""
    from torch._logging._internal import GET_DTRACE_STRUCTURED, trace_log

    return bool(trace_log.handlers) or GET_DTRACE_STRUCTURED


def trace_artifact(name: str, text: str) -> None:
    """Add a text to torch's structured log, under the graph that is compiled now. Run on 2.13."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )


@contextmanager
def sizes_forgotten() -> Iterator[None]:
    """Trace with fixed sizes, and let no later compilation know of these. Run on 2.13."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(automatic_dynamic_shapes=False):
        yield


def mark_dynamic(tensor: torch.Tensor) -> None:
    """Let a tensor's sizes vary without a recompile, where the compiler can."""
    import torch._dynamo

    for axis in range(tensor.dim()):
        torch._dynamo.maybe_mark_dynamic(tensor, axis)


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

    said = counters["unimplemented"]
    return _refused(said.total(), len(said))


@lru_cache(maxsize=1)
def _refused(complaints: int, kinds: int) -> int:
    """As above; asked in each step, and looked up when torch has said anything new."""
    from torch._dynamo.utils import counters

    said = counters["unimplemented"].items()
    return sum(count for words, count in said if "recompile limit" in words)


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


def traced_size(size: torch.SymInt) -> int:
    """What a size was in the call that is traced; adds no guard. Run on 2.13."""
    return int(size.node.hint)


def storage_uses(tensor: torch.Tensor) -> int:
    """How many references to a tensor's memory there are. Run on 2.13."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def size_expression(size: torch.SymInt) -> object:
    """What a symbolic size stands for, in sympy. Run on 2.13."""
    return size.node.expr


def is_erased(node: fx.Node) -> bool:
    """Whether a node was taken out of its graph. Run on 2.13."""
    return bool(node._erased)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Inside an op that autocast has called: ops below see none of it. Run on 2.13."""
    keys = torch._C.DispatchKey
    key = keys.AutocastCUDA if device == "cuda" else keys.AutocastCPU
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def storage_key(tensor: torch.Tensor) -> int | None:
    """What a tensor and its views have in common, fake or not; None inside a function that is
    mapped over tensors (`torch.vmap`), where they have no storage to see. Torch 2.11 to 2.14."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return int(tensor.untyped_storage()._cdata)


def storage_at(address: int, device: torch.device, nbytes: int) -> torch.types.Storage:
    """A storage over memory that it does not own. Run on 2.11."""
    return torch._C._construct_storage_from_data_pointer(address, device, nbytes)


def watch_new_nodes(gm: fx.GraphModule, watcher: Callable[[fx.Node], None]) -> None:
    """Call a function with each node that is made in a graph, before it is put in its place; once
    for each, however often it is asked for. Run on 2.13; read in 2.14."""
    if watcher not in gm._create_node_hooks:
        gm._register_create_node_hook(watcher)


def unwatch_new_nodes(gm: fx.GraphModule, watcher: Callable[[fx.Node], None]) -> None:
    """Undo `watch_new_nodes`. Run on 2.13; read in 2.14."""
    if watcher in gm._create_node_hooks:
        gm._unregister_create_node_hook(watcher)


def inserts_after(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a node that is made now comes after one that is there. Run on 2.13."""
    insert: Any = graph._insert  # a method of the node that the new one goes to
    at = insert.__self__
    if at is graph._root or at is node:
        return at is graph._root or insert.__name__ == "append"
    return bool(node < at)
