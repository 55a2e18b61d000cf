"""Graphs compiled block by block: alike blocks once, and nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparselora_fx as slx
from sparselora_fx.compiler import backend as slx_backend
from sparselora_fx.compiler.piecewise import compile_piecewise
from tests.support import oracle
from tests.support.slow import slow

pytestmark = pytest.mark.private_torch

LAYERS = 4
TORCH_211 = torch.__version__.startswith("2.11.")
EVEN = {"mlp": 0.75, "self_attn": 0.25}


PROGRAM = f"""
import hashlib, json
import torch
from torch._dynamo.utils import counters
from tests.support import oracle
from tests.compiler import test_piecewise
got = oracle.run_compiled(
    test_piecewise.model_of("plain"), oracle.batch(), oracle.plan_of({EVEN}), "inductor"
)
digest = hashlib.sha256(got.loss.numpy().tobytes())
for name in sorted(got.gradients):
    digest.update(got.gradients[name].numpy().tobytes())
print(json.dumps([digest.hexdigest(), dict(counters["aot_autograd"])]))
"""


class Block(nn.Module):
    """A block whose pieces can be made to differ, or not to be cut, in one way."""

    def __init__(self, kind: str = "", place: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kind, self.place = kind, place

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).relu()
        if self.kind == "constant":
            h = h * (1.0 + self.place)
        elif self.kind == "in place":
            h = self.linear(h).add_(1.0)
        elif self.kind == "augmented":
            h = self.linear(h)
            h += x
        elif self.kind == "dropout":
            h = nn.functional.dropout(h, 0.5)
        return h + x


class Stack(nn.Module):
    def __init__(self, kind: str = "", depth: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Block(kind, place) for place in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class Between(Stack):
    """Something is computed between the blocks, which is alike but after the last."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            parts = layer(h).chunk(2, dim=-1)
            h = torch.cat(parts, dim=-1) * 2
        return self.head(h)


class Scoped(Stack):
    """All blocks run in one region without gradients, which cannot be cut."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        with torch.no_grad():
            for layer in self.layers:
                h = layer(h)
        return self.head(h)


class Counting:
    """A backend that compiles in pieces and knows how many graphs it compiled."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def compile_graph(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.sizes.append(len(gm.graph.nodes))
        return gm.forward

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        blocks = [f"layers.{i}" for i in range(LAYERS)]
        return compile_piecewise(gm, inputs, blocks, self.compile_graph)


def both(model: nn.Module, *, dynamic: bool | None = None, seed: int = 3) -> tuple[Any, Any, int]:
    """Output and gradients, plain and in pieces, and the number of graphs that were compiled."""
    counting = Counting()
    results = []
    for run in (model, torch.compile(model, backend=counting, dynamic=dynamic)):
        model.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 4, generator=generator)
        torch.manual_seed(seed)
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return results[0], results[1], len(counting.sizes)


@pytest.mark.parametrize(
    ("model", "graphs"),
    [
        (Stack(), 3),  # what comes before the blocks, a block, what comes after
        (Stack("constant"), 1),
        (Stack("in place"), 1),
        (Stack("augmented"), 1),
        (Stack("dropout"), 3),
        (Stack(depth=2), 1),
        (Between(), 3),
        (Scoped(), 1),
    ],
    ids=["alike", "constants", "in place", "augmented", "dropout", "two", "between", "no grad"],
)
def test_alike_blocks_are_compiled_once(model: nn.Module, graphs: int) -> None:
    """Results are those of the model; what may not be cut is compiled whole."""
    expected, got, compiled = both(model)
    assert all(map(torch.equal, got, expected))
    assert compiled == graphs


def test_sizes_may_vary() -> None:
    """Symbolic sizes reach the pieces that need them: one compilation serves other lengths."""
    counting, model = Counting(), Stack()
    run = torch.compile(model, backend=counting, dynamic=True)
    for rows in (6, 9):
        x = torch.randn(rows, 4)
        assert torch.equal(run(x), model(x))
    assert len(counting.sizes) == 3


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of each graph that the named backend compiles from now on."""
    sizes: list[int] = []
    inner = slx_backend.inductor_backend.backend_compile

    def counted(name: str, gm: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        sizes.append(len(gm.graph.nodes))
        return inner(name, gm, inputs, **options)

    monkeypatch.setattr(slx_backend.inductor_backend, "backend_compile", counted)
    return sizes


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile graphs whole from now on."""
    monkeypatch.setattr(
        slx_backend,
        "compile_piecewise",
        lambda gm, inputs, blocks, compile_graph: compile_graph(gm, inputs),
    )


def model_of(kind: str) -> nn.Module:
    dropout = 0.1 if kind == "dropout" else 0.0
    # There Inductor takes the log-sum-exp of fused fp64 attention for fp32, as its fake says.
    attention = "eager" if torch.__version__.startswith(("2.11.", "2.12.")) else "sdpa"
    model = oracle.llama(layers=LAYERS, dtype=torch.float64, dropout=dropout, attention=attention)
    if kind == "checkpointing":
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


@pytest.mark.parametrize("kind", ["dropout", slow("checkpointing"), slow("trimmed")])
def test_a_model_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three graphs for all layers; gradients are those of the model compiled whole, or masked."""
    split = kind == "trimmed"
    tokens = "context" if split else "all"
    plan = slx.SparsityPlan(EVEN, tokens=tokens, start_step=0, channel_multiple=1)
    data = oracle.batch()
    if split:
        data["labels"][:, :6] = -100
    sizes = compiled_graphs(monkeypatch)
    got = oracle.run_compiled(model_of(kind), data, plan, "aot_eager", trim_logits=split)
    # Checkpointing makes the embeddings require a gradient, a graph break: they and the head are
    # graphs of their own (one graph fewer on 2.11).
    assert len(sizes) == (5 - TORCH_211 if kind == "checkpointing" else 3)
    assert len(got.record.sites) == 7 * LAYERS
    if split:
        whole(monkeypatch)
        torch.compiler.reset()
        expected = oracle.run_compiled(model_of(kind), data, plan, "aot_eager", trim_logits=True)
        oracle.assert_close(got, expected, 1e-13)
    else:
        oracle.assert_close(got, oracle.reference_step(model_of(kind), data, got.record), 1e-9)


@pytest.mark.slow
def test_unlike_layers_share_nothing_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 1 and 2 are alike, those around them are like no other."""
    sparsity = {f"layers.{i}.mlp": s for i, s in enumerate((0.25, 0.5, 0.5, 0.75))}
    sizes = compiled_graphs(monkeypatch)
    got = oracle.run_compiled(model_of("plain"), oracle.batch(), oracle.plan_of(sparsity))
    assert len(sizes) == 3
    reference = oracle.reference_step(model_of("plain"), oracle.batch(), got.record)
    oracle.assert_close(got, reference, 1e-9)


@pytest.mark.slow
def test_lengths_vary_in_pieces() -> None:
    """Batches of several lengths, on one model: sizes become symbols."""
    model, reference = model_of("plain"), model_of("plain")
    plan = oracle.plan_of(EVEN)
    slx.compile(model, oracle.estimator_of(model), plan=plan, backend="aot_eager")
    for length in (13, 17, 21):
        data = oracle.batch(length=length, seed=length)
        with slx.record(model) as record:
            got = oracle.step(model, data)
        oracle.assert_close(got, oracle.reference_step(reference, data, record), 1e-9)


@pytest.mark.slow
def test_inductor_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code: the numbers of the masked-dense model."""
    sizes = compiled_graphs(monkeypatch)
    got = oracle.run_compiled(model_of("plain"), oracle.batch(), oracle.plan_of(EVEN), "inductor")
    assert len(sizes) == 3
    reference = oracle.reference_step(model_of("plain"), oracle.batch(), got.record)
    oracle.assert_close(got, reference, 1e-5)  # norms are in fp32


@pytest.mark.slow
def test_a_fresh_process_finds_the_pieces(tmp_path: Path) -> None:
    """Every piece comes from AOTAutograd's cache, and the step is the same, bit for bit."""
    paths = str(Path(__file__).parents[2])
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    steps, counts = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        digest, found = json.loads(done.stdout.splitlines()[-1])
        steps.append(digest)
        counts.append((found.get("autograd_cache_miss", 0), found.get("autograd_cache_hit", 0)))
    assert steps[0] == steps[1]
    assert counts == [(3, 0), (0, 3)]
