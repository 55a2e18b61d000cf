"""Inductor's cache key covers the lowerings: a changed template is compiled anew, an unchanged one
is found again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.private_torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import torch
from torch._dynamo.utils import counters
from sparselora_fx.ir import autograd
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import cache_key, inductor_backend

def backend(gm, inputs):
    return inductor_backend.backend_compile("inductor", gm, inputs, rewritten=True)

def region(x, w, idx):
    return torch.relu(OPS.sliced_linear(x, w, idx))

x = torch.arange(48.0).reshape(2, 3, 8).requires_grad_()
w, idx = torch.arange(128.0).reshape(16, 8) / 64 - 1, torch.tensor([1, 4, 9])
y = torch.compile(region, backend=backend)(x, w, idx)
(gx,) = torch.autograd.grad(y.sum(), x)
kept = torch.relu(x.detach() @ w[idx].t())
right = torch.allclose(y, kept) and torch.allclose(gx, (kept > 0).float() @ w[idx])
found = counters["aot_autograd"]
hits = found["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps({"right": bool(right), "hit": hits > 0, "key": cache_key.key()}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    copy = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparselora_fx", copy / "sparselora_fx", symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "passes", copy / "passes", ignore=ignore)
    return copy


def run(tree: Path, cache: Path, **environment: str) -> dict:
    """Compile and run one region in a fresh process with a cache of its own."""
    import json

    settings = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(tree), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tree,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_changes_code_misses_and_what_does_not_hits(tree: Path, tmp_path: Path) -> None:
    """One compilation each: as before, with a debug setting, with a changed template."""
    cache = tmp_path / "cache"
    first = run(tree, cache)
    assert first["right"] and not first["hit"]
    again = run(tree, cache)
    assert again["right"] and again["hit"] and again["key"] == first["key"]

    checked = run(tree, cache, SPARSELORA_DEBUG_BOUNDS="1")
    assert checked["right"] and not checked["hit"] and checked["key"] != first["key"]

    template = tree / "sparselora_fx/lowering/templates/out_sliced.py.jinja"
    template.write_text(template.read_text() + "{# changed #}\n")
    changed = run(tree, cache)
    assert changed["right"] and not changed["hit"] and changed["key"] != first["key"]


def test_key_covers_every_file_of_the_lowerings(tree: Path) -> None:
    """Each of them changes the key; computed on a copy, so that nothing is compiled."""
    files = [
        "lowering/configs.py", "lowering/templates/store_tile.jinja", "ir/ops.py", "_torch.py",
    ]  # fmt: skip
    program = f"""
from pathlib import Path
import sparselora_fx
from sparselora_fx.lowering import cache_key
print(cache_key.key())
for name in {files!r}:
    file = Path(sparselora_fx.__file__).parent / name
    file.write_text(file.read_text() + chr(10))
    print(cache_key.key())
"""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == len(files) + 1
