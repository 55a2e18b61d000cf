"""A `torch.compile` backend that lowers both graphs as for an NVIDIA GPU and runs the result with
Triton's interpreter.

Dynamo and AOTAutograd trace with CPU tensors, Inductor's passes run, and then every value is
relabelled as ``cuda:0`` and lowered: templates, epilogue fusion and wrapper are what a GPU would
get. The wrapper then runs on CPU tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from sparselora_fx.lowering import inductor_backend, measured
from tests.support.fake_cuda import fake_cuda
from tests.support.shared_launches import shared_launches
from tests.support.triton_interpreter import load_wrapper

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


@dataclass
class FakeGPU:
    """The backend. ``choice`` is "template", "fallback" (both as if benchmarked best),
    "picked", "slower" (as if the picked template had been measured to be faster, or slower) or
    "unmeasured".

    ``plain``: with Inductor's own settings, as plain `torch.compile` has them, not those of
    rewritten graphs. Without ``execute`` code is generated but not run: outputs are left
    uninitialised.
    ``tile`` limits the benchmarked templates, e.g. "BLOCK_K=64, BLOCK_M=64, BLOCK_N=64".
    ``codes`` collects ``(is_backward, wrapper source)`` of every graph.
    """

    arch: int = 90
    choice: str = "template"
    plain: bool = False
    execute: bool = True
    tile: str = "BLOCK_K=(32|64), BLOCK_M=64, BLOCK_N=64"
    codes: list[tuple[bool, str]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        import torch._functorch.config as functorch_config
        import torch._inductor.config as config
        from torch._inductor.compile_fx import compile_fx

        assert inductor_backend.install_lowerings()
        ours = {
            **inductor_backend.settings_for("cuda"),
            "post_grad_custom_pre_pass": inductor_backend.graph_pass(),
        }
        patches = {
            **({} if self.plain else ours),
            "max_autotune_gemm": self.choice in ("template", "fallback"),
            "benchmark_epilogue_fusion": False,
            "fx_graph_cache": False,
            "compile_threads": 1,
            "comprehensive_padding": False,  # the backward is not told of padded strides here
            "triton.use_tensor_descriptor": False,
        }
        with (
            config.patch(patches),
            functorch_config.patch(enable_autograd_cache=False),
            shared_launches(),
        ):
            # A backward is compiled later, when nothing of this is set any more.
            inner = shared_launches()(config.patch(patches)(self._compile))
            return compile_fx(gm, inputs, inner_compile=inner)

    @property
    def kernels(self) -> list[tuple[str, str]]:
        """Name and source of every generated kernel, forward first."""
        return [found for _, code in self.codes for found in _KERNEL.findall(code)]

    def kernel_names(self, *, backward: bool) -> list[str]:
        """Names of the kernels of the forward or of the backward graphs."""
        codes = [code for is_backward, code in self.codes if is_backward == backward]
        return [name for code in codes for name, _ in _KERNEL.findall(code)]

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        from torch._inductor.compile_fx import (
            fake_tensor_prop,
            record_original_output_strides,
            view_to_reshape,
        )
        from torch._inductor.fx_passes.post_grad import post_grad_passes
        from torch._inductor.virtualized import V

        view_to_reshape(gm)
        with torch.no_grad():
            mode = fake_tensor_prop(gm, inputs)
        record_original_output_strides(gm)
        with V.set_fake_mode(mode):
            post_grad_passes(gm, is_inference=bool(options.get("is_inference", False)))
        is_backward = bool(options.get("is_backward", False))
        outputs = gm.graph.output_node().args[0]
        code = self._generate(gm, inputs, mode, is_backward)
        self.codes.append((is_backward, code))
        if self.execute:
            return _boxed(load_wrapper(code))
        values = [None if node is None else node.meta["val"] for node in outputs]
        return _boxed(lambda _: [_uninitialised(value) for value in values])

    def _generate(
        self, gm: fx.GraphModule, inputs: Sequence[Any], mode: Any, is_backward: bool
    ) -> str:
        import torch._subclasses.fake_tensor as fake_tensor
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.select_algorithm import AlgorithmSelectorCache
        from torch._inductor.virtualized import V

        # As if the template had been measured, and were the faster or the slower one.
        ratio = 0.0 if self.choice == "picked" else 2.0
        with (
            fake_cuda(self.arch),
            measured.assume(ratio) if self.choice != "unmeasured" else nullcontext(),
            patch.object(fake_tensor, "init_gpu_context", lambda *_: None),
            patch.object(AlgorithmSelectorCache, "make_precompile_fn", lambda *_, **__: dict),
            patch.object(AlgorithmSelectorCache, "do_autotuning", self._timings),
        ):
            _relabel_graph(gm, mode)
            examples = [_relabel(value, mode) for value in inputs]
            graph = GraphLowering(
                gm, example_inputs=examples, shape_env=mode.shape_env, is_backward=is_backward
            )
            with (
                V.set_fake_mode(mode),
                V.set_debug_handler(DebugContext()),
                V.set_graph_handler(graph),
            ):
                graph.run(*examples)
                generated, _ = graph.codegen()
        return str(generated.value)

    def _timings(
        self,
        name: str,
        inputs: Any,
        layout: Any,
        generators: Any,
        key: Any,
        choices: list[Any],
        *_: Any,
        **__: Any,
    ) -> dict[Any, float]:
        """Stands for the benchmark: one second for the wanted choice, two for the others."""
        best = next((c for c in choices if self._wanted(c)), choices[0])
        self.choices.append(f"{name}: {best.name}")
        return {choice: 1.0 if choice is best else 2.0 for choice in choices}

    def _wanted(self, choice: Any) -> bool:
        ours = "sparselora_" in choice.name
        if not ours:
            return "Extern" in type(choice).__name__
        if self.choice == "fallback":
            return "fallback" in choice.name
        return (
            "fallback" not in choice.name and re.search(self.tile, choice.description) is not None
        )


def compile_kernel(name: str, source: str, arch: int) -> Any:
    """A generated kernel compiled for an architecture as Inductor would: Triton's
    ``CompiledKernel``."""
    import torch._inductor.config as config
    from torch._inductor.codecache import PyCodeCache

    launchers = (
        "use_static_cuda_launcher",
        "use_static_triton_launcher",
    )  # they load onto a device
    off = {name: False for name in launchers if hasattr(config, name)}
    with fake_cuda(arch), config.patch({**off, "compile_threads": 1}):
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        (result,) = kernel.compile_results
    return result.kernel


def _boxed(call: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    def run(args: Sequence[Any]) -> Any:
        return call(list(args))

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _uninitialised(value: Any) -> Any:
    """What a graph that is not run returns in place of a value; sizes that vary are those of the
    example."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty([_uninitialised(size) for size in value.shape], dtype=value.dtype)


def _relabel(value: Any, mode: Any) -> Any:
    """The same fake tensor on ``cuda:0``."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, list | tuple):
        return type(value)(_relabel(item, mode) for item in value)
    if not isinstance(value, FakeTensor) or value.device.type != "cpu":
        return value
    meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(mode, meta, torch.device("cuda", 0))


def _relabel_graph(gm: fx.GraphModule, mode: Any) -> None:
    def moved(value: Any) -> Any:
        return torch.device("cuda", 0) if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _relabel(node.meta["val"], mode)
        node.args = tuple(moved(value) for value in node.args)
        node.kwargs = {key: moved(value) for key, value in node.kwargs.items()}
    gm.recompile()
