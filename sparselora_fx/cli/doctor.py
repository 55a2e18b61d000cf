"""What is installed here, what would run where, and what is known to be trouble."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from sparselora_fx import environment
from sparselora_fx.compiler.switches import check_switches
from sparselora_fx.errors import SparseLoraError
from sparselora_fx.lowering import measured
from sparselora_fx.lowering.inductor_backend import KNOWN_VERSIONS

_PACKAGES = (
    "sparselora_fx", "torch", "transformers", "peft", "accelerate", "triton", "tensorboard",
    "pyarrow",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """``versions``, ``gpus``, ``compilers``, ``runs`` (what would run where) and ``trouble``: a
    sentence each with the remedy; empty if all is well."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in _PACKAGES}},
        "gpus": gpus,
        "compilers": {name: shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")},
        "settings": {
            name: value
            for name in (environment.DISABLED_PASSES, environment.DISABLED_LAYERS)
            if (value := environment.given(name))
        },
    }
    table = measured.known_gpus()
    runs = {"cpu": "Inductor's C++ kernels; gather + matmul"}
    for name in gpus:
        which = "Triton templates where they were measured to be faster, else gather + cuBLAS"
        runs[name] = which if name in table else "gather + cuBLAS: no kernel was measured on it"
    found["runs"] = runs
    found["trouble"] = _trouble(found)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _trouble(found: dict[str, Any]) -> list[str]:
    said = []
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in KNOWN_VERSIONS:
        said.append(
            f"torch {torch.__version__} is not one that the lowerings were written for "
            f"({', '.join(KNOWN_VERSIONS)}): results are right, speed may not be"
        )
    if not any(found["compilers"][name] for name in ("c++", "g++", "clang++")):
        said.append("no C++ compiler: backend='inductor' cannot compile for a CPU; install g++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        said.append(f"no {headers}: Inductor needs Python's headers; install python3-dev")
    if found["gpus"] and importlib.util.find_spec("triton") is None:
        said.append("a GPU and no triton: backend='inductor' cannot use it; pip install triton")
    if version == "2.11" and found["gpus"]:
        said.append(
            "torch 2.11 with triton 3.6: LoRA dropout inside checkpointed blocks does not compile "
            "on a GPU (a kernel of torch's own); set the dropout to 0, or take a newer torch"
        )
    try:
        check_switches()
    except SparseLoraError as error:
        said.append(str(error))
    return said
