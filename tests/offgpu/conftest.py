"""These tests run kernels in Triton's interpreter, which has to be chosen before triton is first
imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
TOO_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"

if HAS_TRITON and not TOO_LATE:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Test modules import triton, so without it nothing here can be collected; say so."""
    if HAS_TRITON or HERE not in collection_path.parents:
        return None
    if collection_path.name.startswith("test_"):
        print(f"not collected: {collection_path.name} needs triton (pip install triton==3.7.1)")
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if TOO_LATE and item.get_closest_marker("offgpu"):
        pytest.fail("triton was imported before tests/offgpu could choose its interpreter")
