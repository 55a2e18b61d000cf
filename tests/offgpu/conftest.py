"""These tests run kernels in Triton's interpreter, which has to be chosen before triton is first
imported."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Choose the interpreter before the first test module here is imported, or say why not."""
    if HERE not in collection_path.parents:
        return None
    reason = why_not(config.getoption("markexpr"))
    if reason is None:
        return None
    if collection_path.name.startswith("test_"):
        print(f"not collected: tests/offgpu/{collection_path.name}: {reason}")
    return True


@functools.cache
def why_not(marks: str) -> str | None:
    """Why these tests cannot run in this session, or None after choosing the interpreter for all of
    it."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return "needs triton (pip install triton==3.7.1)"
    if torch.cuda.is_available() and "offgpu" not in marks:
        return "its interpreter would take the place of the GPU; run them alone with -m offgpu"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/offgpu chose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    return None
