"""No graph holds a real tensor: its caches could not keep one that lives on a GPU."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

import sparselora_fx as slx
from benchmarks.support.graphs import batch_of, capture, llama
from sparselora_fx.ir.ops import channel_rows
from sparselora_fx.lowering import inductor_backend
from tests.support import oracle
from tests.support.slow import slow
from tests.support.token_batches import ragged


def real_tensors(gm: fx.GraphModule) -> list[str]:
    """Where a graph holds tensors with values: attributes, arguments, what is noted on nodes."""
    held = [f"{name} {tuple(value.shape)}" for name, value in gm.__dict__.items() if _real(value)]
    held += [f"{name} {tuple(value.shape)}" for name, value in gm.named_buffers()]
    for node in gm.graph.nodes:
        noted = {key: node.meta.get(key) for key in ("val", "example_value", "tensor_meta")}
        leaves = pytree.tree_leaves([node.args, node.kwargs, noted])
        held += [f"{node} {tuple(leaf.shape)}" for leaf in leaves if _real(leaf)]
    return held


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


@pytest.mark.parametrize("trim", [slow(False), True])
def test_no_graph_holds_a_real_tensor(trim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a sparse step with token lists, as Inductor gets them."""
    found: dict[str, list[str]] = {}

    def keeping(name: str) -> Any:
        def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
            found[f"{name} {len(found)}"] = real_tensors(gm)
            return make_boxed_func(gm.forward)

        return compiler

    def compiled(name: str, gm: fx.GraphModule, inputs: Any, *, rewritten: bool) -> Any:
        assert rewritten
        return aot_autograd(
            fw_compiler=keeping("forward"), bw_compiler=keeping("backward"),
            decompositions=inductor_backend._all_decomposed(),
        )(gm, inputs)  # fmt: skip

    monkeypatch.setattr(inductor_backend, "backend_compile", compiled)
    model = oracle.llama()
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    oracle.run_compiled(model, ragged(), plan, "aot_eager", trim_logits=trim)
    assert any("backward" in name for name in found)
    assert not any(found.values()), found


def test_counting_on_the_meta_device_warns_of_no_missing_derivative() -> None:
    shape = {
        "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 112,
    }  # fmt: skip
    plan = slx.SparsityPlan(0.5, start_step=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        _, backwards = capture(llama(shape, 1), batch_of(2, 24, 8), plan, rank=4, trim_logits=True)
    assert sum(graph.total() for graph in backwards) > 0


@pytest.mark.parametrize("offsets", [[3], [0, 5], [4, 14, 24], [9, 1, 20], [7, 2]], ids=str)
def test_rows_of_channels(offsets: list[int]) -> None:
    channels = torch.tensor([0, 2, 3, 9])
    expected = [c // 4 * 40 + c % 4 + o for o in offsets for c in channels.tolist()]
    assert channel_rows(channels, 4, 40, offsets).tolist() == expected


PROGRAM = """
import json
from tests.support import oracle
import torch
from tests.support.token_batches import ragged
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
import sparselora_fx as slx
from tests.compiler.test_graph_constants import pickled_tensors

plain, held = AOTAutogradCache._pickle_entry, []

def watched(entry, *args):
    held.extend(pickled_tensors(entry))
    return plain(entry, *args)

AOTAutogradCache._pickle_entry = staticmethod(watched)
plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
oracle.run_compiled(oracle.llama(layers=1), ragged(), plan, "inductor")
found = counters["aot_autograd"]
names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
print(json.dumps({"held": held, **{name: found[name] for name in names}}))
"""


def pickled_tensors(value: Any) -> list[str]:
    """The tensors that a pickle of a value holds."""
    held: list[str] = []

    class Watching(pickle.Pickler):
        def reducer_override(self, part: Any) -> Any:
            if isinstance(part, Tensor):
                held.append(f"{part.dtype} {tuple(part.shape)}")
            return NotImplemented

    Watching(io.BytesIO()).dump(value)
    return held


@pytest.mark.slow
def test_a_fresh_process_finds_the_graphs_of_a_sparse_step(tmp_path: Path) -> None:
    """What AOTAutograd's cache keeps holds no tensor, and is found again."""
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
    }
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = runs
    assert cold["held"] == [] and cold["autograd_cache_miss"] > 0
    assert warm["autograd_cache_hit"] > 0 and warm["autograd_cache_miss"] == 0
    assert cold["autograd_cache_bypass"] == warm["autograd_cache_bypass"] == 0
