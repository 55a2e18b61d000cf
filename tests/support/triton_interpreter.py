"""Run the wrapper that Inductor generated for CUDA on CPU tensors, its kernels with Triton's
interpreter.

Two defects of the interpreter (triton 3.6 and 3.7) are repaired here: `tl.dot` multiplies the raw
bits of bf16 operands, and float32 -> bf16 truncates where the hardware rounds to nearest even.
Outputs start as NaN, so an element that no program stores is seen.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import math as tl_math
from tests.support.triton_interpreter import LIBDEVICE as libdevice
"""
# The decorator that would tune and launch a kernel; helper functions may come before it.
_HEURISTICS = re.compile(r"^@triton_heuristics\..*?^\)\n(?=@triton\.jit)", re.MULTILINE | re.DOTALL)
_COMBINED = re.compile(r"'combo_grid_meta': (\{[^}]*\})")
_NUMBERS = itertools.count()
_BLOCK = 64  # elements of a pointwise or reduction kernel per program
_FOLDER = tempfile.TemporaryDirectory()  # the interpreter reads a kernel's source at its first run


class _LibDevice:
    """Functions of CUDA's libdevice, which the interpreter lacks, as those of `tl` while it has
    patched them."""

    def isnan(self, x: Any) -> Any:
        return x != x

    def isinf(self, x: Any) -> Any:
        return tl.abs(x) == float("inf")

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)


LIBDEVICE = _LibDevice()


def _repair_bf16() -> None:
    create_dot = interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert(handle.data, handle.dtype, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data.reshape(handle.data.shape), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, mode)
        values = torch.from_numpy(np.frombuffer(x.tobytes(), np.float32).copy())
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(x.shape)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = rounded


_repair_bf16()
# Inductor compiles its kernels with Triton's debug option, which keeps `tl.device_assert`.
interpreter.interpreter_builder.options = replace(
    interpreter.interpreter_builder.options, debug=True
)


class Kernel:
    """One generated kernel. ``run`` takes what the wrapper passes and loops over the grid."""

    def __init__(self, name: str, source: str) -> None:
        body = _HEURISTICS.sub("", source[source.index("@triton.jit") :])
        path = Path(_FOLDER.name) / f"kernel{next(_NUMBERS)}.py"
        path.write_text(_HEADER + body, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.function = getattr(module, name)
        found = re.search(rf"def {name}\((.*?)\):", body, re.DOTALL)
        assert found is not None
        self.parameters = [text.split(":")[0].strip() for text in found[1].split(",")]
        self.fixed_grid = "'grid_type': 'FixedGrid'" in source
        combined = _COMBINED.search(source)
        self.combined: dict[str, Any] = ast.literal_eval(combined[1]) if combined else {}

    def run(self, *args: Any, stream: Any = None, **_: Any) -> None:
        if self.fixed_grid:
            *args, x, y, z = args  # type: ignore[assignment]
            self.function[(int(x), int(y), int(z))](*args)
            return
        blocks = {name: _BLOCK for name in self.parameters if name.endswith("BLOCK")}
        values = dict(zip(self.parameters, args, strict=False))
        if self.combined:
            grid = self._combined_grid(values, blocks)
        else:
            sizes = [int(values.get(f"{axis}numel", 1)) for axis in "xyz"]
            tiles = [blocks.get(f"{axis}BLOCK", 1) for axis in "XYZ"]
            grid = tuple(max(1, triton.cdiv(n, b)) for n, b in zip(sizes, tiles, strict=True))
        self.function[grid](*args, **blocks)

    def _combined_grid(self, values: dict[str, Any], blocks: dict[str, int]) -> tuple[int, ...]:
        """Several kernels in one: their blocks along x one after the other, along y the most."""
        meta, across, along = self.combined, 0, 1
        for i in range(meta["num_kernels"]):
            size = meta[f"xnumel_{i}"] or int(values[f"xnumel_{i}"])
            across += size if meta[f"no_x_dim_{i}"] else triton.cdiv(size, blocks["XBLOCK"])
            if f"ynumel_{i}" in meta:
                rows = meta[f"ynumel_{i}"] or int(values[f"ynumel_{i}"])
                along = max(along, triton.cdiv(rows, blocks["YBLOCK"]))
        return (max(1, across), along, 1)


def _poisoned(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_strided(size, stride, dtype=dtype)
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(-1)


class _Compiler:
    def triton(self, name: str, source: str, device_str: str = "") -> Kernel:
        return Kernel(name, source)

    def wait(self, scope: Any) -> None:
        pass


def load_wrapper(code: str) -> Callable[[list[Any]], Any]:
    """The ``call`` function of a generated wrapper, freed from the device."""
    replacements = (
        (r"^async_compile = AsyncCompile\(\)", "async_compile = _COMPILER"),
        (
            r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream",
            "get_raw_stream = int",
        ),
        (r"^empty_strided_(cuda|cpu) = .*", r"empty_strided_\1 = _POISONED"),
        (r"^empty_strided_p2p = .*", ""),
        (r"with torch\.cuda\._DeviceGuard\(0\):", "if True:"),
        (r"torch\.cuda\.set_device\(0\)", "pass"),
        (r"device\(type='cuda', index=0\)", "device(type='cpu')"),
    )
    for pattern, text in replacements:
        code = re.sub(pattern, text, code, flags=re.MULTILINE)
    for end in ("\ndef get_args()", "\ndef benchmark_compiled_module"):
        code = code.split(end)[0]
    names: dict[str, Any] = {
        "_COMPILER": _Compiler(),
        "_POISONED": _poisoned,
        "__name__": "wrapper",
    }
    exec(compile(code, "<wrapper>", "exec"), names)
    call: Callable[[list[Any]], Any] = names["call"]
    return call
