"""The lowerings on a CPU, the rules that choose, and what happens with a torch that is not
known."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.errors import CompileError
from sparselora_fx.ir import autograd
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import (
    cache_key,
    configs,
    constraints,
    inductor,
    inductor_backend,
    measured,
    triton,
)
from sparselora_fx.lowering.constraints import Problem
from sparselora_fx.lowering.triton import FAMILIES, TEMPLATES, read_template
from tests.support import oracle
from tests.support.slow import slow

pytestmark = pytest.mark.private_torch

assert autograd.LIBRARY is not None  # importing it registers the derivatives
GPU = torch.device("cuda", 0)
GOOD = Problem(
    devices=(GPU, GPU, GPU),
    dtype=torch.bfloat16,
    weight_dtype=torch.bfloat16,
    index_dtype=torch.int64,
    tokens=512,
    outputs=128,
    inner=64,
    kept=128,
    weight=(256, 64),
    contiguous_rows=True,
)


def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    return inductor_backend.backend_compile("inductor", gm, inputs, rewritten=True)


def region(x: torch.Tensor, w: torch.Tensor, down: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return OPS.sliced_linear_in(torch.relu(OPS.sliced_linear(x, w, idx)), down, idx)


def inputs(lead: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(*lead, 24, dtype=dtype, requires_grad=True)
    w = torch.randn(64, 24, dtype=dtype, requires_grad=True)
    return x, w, torch.randn(20, 64, dtype=dtype), torch.randperm(64)[:16].sort().values


@pytest.mark.parametrize(
    ("dtype", "lead"),
    [
        (torch.float32, (2, 5)),
        (torch.bfloat16, (7,)),
        slow(torch.float32, (7,)),
        slow(torch.bfloat16, (2, 5)),
    ],
    ids=str,
)
def test_cpu_lowering_equals_eager(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(lead, dtype)
    results = []
    for fn in (region, torch.compile(region, backend=backend)):
        out = fn(*given)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), given[:2])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_unknown_torch_is_decomposed_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    inductor_backend.install_lowerings.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"torch 9\.9\.0.*gather \+ matmul"):
            assert not inductor_backend.install_lowerings()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not inductor_backend.install_lowerings()
        given = inputs((7,), torch.float32)
        torch.testing.assert_close(torch.compile(region, backend=backend)(*given), region(*given))
    finally:
        inductor_backend.install_lowerings.cache_clear()


def test_torch_without_what_we_need_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AttributeError("module has no attribute 'TritonTemplate'")

    monkeypatch.setattr(inductor_backend, "install", missing)
    inductor_backend.install_lowerings.cache_clear()
    try:
        with pytest.warns(UserWarning, match="TritonTemplate"):
            assert not inductor_backend.install_lowerings()
    finally:
        inductor_backend.install_lowerings.cache_clear()


def test_a_users_pass_runs_and_stays_in_the_key() -> None:
    """Our key travels as a custom pass; one that was configured before keeps its place."""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(graph)

        def uuid(self) -> str:
            return "theirs"

    with config.patch(post_grad_custom_pre_pass=Theirs()):
        key = inductor_backend.graph_pass()
        graph = torch.fx.Graph()
        key(graph)
    assert seen == [graph]
    assert key.uuid() == (cache_key.key(), "theirs")
    with config.patch(post_grad_custom_pre_pass=lambda graph: None):
        assert inductor_backend.graph_pass().uuid() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"devices": (torch.device("cpu"),) * 3}, constraints.NOT_CUDA),
        ({"devices": (GPU, torch.device("cuda", 1), GPU)}, constraints.MIXED_DEVICES),
        ({"dtype": torch.float64}, constraints.DTYPE),
        ({"weight_dtype": torch.int8}, constraints.DTYPE),
        ({"index_dtype": torch.int32}, constraints.INDEX_DTYPE),
        ({"kept": "s0"}, constraints.SYMBOLIC_KEPT),
        ({"weight": (256, "s1")}, constraints.SYMBOLIC_WEIGHT),
        ({"kept": 0}, constraints.EMPTY),
        ({"tokens": "s0"}, None),
    ],
)
def test_ineligible(change: dict[str, Any], reason: str | None) -> None:
    assert constraints.ineligible(replace(GOOD, **change)) == reason


@pytest.mark.parametrize(
    ("change", "ratio", "reason"),
    [
        ({}, 0.9, None),
        ({}, None, constraints.NOT_MEASURED),
        ({}, 1.1, constraints.SLOWER),
        ({"kept": 40}, 0.9, constraints.RAGGED_KEPT),
        ({"dtype": torch.float32}, 0.9, constraints.FULL_FLOAT32),
        ({"contiguous_rows": False}, 0.9, constraints.STRIDED_GATHER),
    ],
)
def test_unpromising(change: dict[str, Any], ratio: float | None, reason: str | None) -> None:
    assert constraints.unpromising(replace(GOOD, **change), ratio) == reason


def point(template: str, tokens: int, outputs: int, inner: int, ratio: float) -> dict[str, Any]:
    sizes = {"tokens": tokens, "outputs": outputs, "inner": inner}
    return {"template": template, **sizes, "ratio": ratio}


POINTS = [
    point("out_sliced", 512, 1024, 4096, 0.7),
    point("out_sliced", 2048, 1024, 4096, 1.2),
    point("reduction_sliced", 512, 4096, 1024, 0.8),
]


@pytest.mark.parametrize(
    ("gpu", "template", "sizes", "expected"),
    [
        ("card", "out_sliced", (512, 1024, 4096), 0.7),
        ("card", "out_sliced", (800, 1100, 5120), 0.7),
        ("card", "out_sliced", (1500, 1024, 4096), 1.2),
        ("card", "reduction_sliced", (512, 4096, 1024), 0.8),
        ("card", "out_sliced", (8192, 1024, 4096), None),  # two octaves from the nearest
        ("card", "out_sliced", (512, 1024, 1024), None),
        ("another card", "out_sliced", (512, 1024, 4096), None),
    ],
)
def test_the_nearest_measurement_decides(
    gpu: str,
    template: str,
    sizes: tuple[int, int, int],
    expected: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"card": POINTS}))
    before = cache_key.key()
    monkeypatch.setenv("SPARSELORA_KERNEL_TABLE", str(path))
    assert measured.ratio(gpu, template, *sizes) == expected
    assert cache_key.key() != before
    with measured.assume(0.5):
        assert measured.ratio(gpu, template, *sizes) == 0.5


@pytest.mark.parametrize(
    "text",
    [None, "[]", '{"card": [{"template": "out_sliced"}]}', '{"card": 3}', "{",
     json.dumps({"card": [point("out_sliced", 0, 1, 1, 1.0)]})],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_refused(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SPARSELORA_KERNEL_TABLE", str(path))
    model = oracle.llama()
    with pytest.raises(CompileError, match="no table of measured kernels"):
        slx.compile(model, oracle.estimator_of(model), plan=0.5)
    assert "forward" not in model.__dict__


def test_shipped_measurements_can_be_read() -> None:
    assert measured.ratio("no such card", "out_sliced", 1, 1, 1) is None


@pytest.mark.parametrize("template", sorted(configs.TILES))
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_tile_fits_the_smallest_shared_memory(template: str, itemsize: int) -> None:
    fitting = configs.tiles(template, itemsize, 101376)  # what sm_86 and sm_89 have
    assert fitting
    for tile in fitting:
        assert configs.shared_upper_bound(template, tile, itemsize) <= 101376
        assert tile.m >= 16 and tile.n >= 16 and tile.k >= 16


@pytest.mark.parametrize(
    ("tokens", "outputs", "expected"),
    [(1, 4096, 16), (30, 16384, 32), (8192, 14336, 128), (1024, 64, 16)],
)
def test_pick(tokens: int, outputs: int, expected: int) -> None:
    found = configs.tiles("out_sliced", 2, 232448)
    assert configs.pick(found, tokens, outputs, 132).m == expected


def test_templates_have_a_legend_and_includes_are_filled_in() -> None:
    assert {family.template for family in FAMILIES.values()} == set(configs.TILES)
    for name in configs.TILES:
        text = (TEMPLATES / f"{name}.py.jinja").read_text()
        assert text.startswith("{# y[m, n] = ") and "Notation" in text and "Numerics" in text
        assert "{% include" not in read_template(name)
        assert "tl.static_assert" in read_template(name)


def test_benchmarks_gather_a_sorted_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's default, all zeros, would read one row over and over."""
    monkeypatch.setattr(inductor, "size_hint", int)
    buffer = SimpleNamespace(get_size=lambda: [16], get_device=lambda: torch.device("cpu"))
    idx = triton._permutation(256)(buffer)
    assert idx.dtype == torch.int64 and idx.shape == (16,)
    assert (idx.diff() > 0).all() and idx.min() >= 0 and idx.max() < 256


def test_debug_setting_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_DEBUG_BOUNDS", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        cache_key.key()
