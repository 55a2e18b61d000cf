"""What is faster when Inductor benchmarks nothing: what a GPU of this name was measured to do.

``measured.json`` beside this file maps a GPU's name to points: the sizes of a matmul, and the time
of the template, with the tile that `configs.pick` takes, over that of gather + cuBLAS. ``python -m
benchmarks.gpu`` measures them. ``SPARSELORA_KERNEL_TABLE`` names another file of that
form.

    {"_provenance": {"NVIDIA H200": {"commit": "b8e6301", "torch": "2.11.0", ...}},
     "NVIDIA H200": [{"template": "out_sliced", "op": "sliced_linear", "tokens": 3072,
                      "outputs": 144, "inner": 4096, "ratio": 0.625}, ...], ...}

``_provenance`` and ``op`` are for people: what the points of a card hold for, and which op was
timed. Two ops that share a template and sizes do the same work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from sparselora_fx.environment import KERNEL_TABLE, kernel_table
from sparselora_fx.errors import CompileError

SHIPPED = Path(__file__).with_name("measured.json")
PROVENANCE = "_provenance"  # beside the cards: what their points were measured with
_NEAR = 1.0  # octaves: a size that far from every measured one was not measured
_assumed: list[float] = []  # by `assume`, the innermost last


class _Point(TypedDict):
    """What was measured at one size."""

    template: str
    tokens: int
    outputs: int
    inner: int
    ratio: float


def ratio(gpu: str, template: str, tokens: int, outputs: int, inner: int) -> float | None:
    """Time of a template over that of gather + cuBLAS, for ``y[tokens, outputs] = x[tokens, inner]
    @ gathered(w)``: that of the point with the nearest sizes (by their logarithms), the slower of
    two that are equally near.

    None: no GPU of this name was measured, or not near these sizes. Raises `CompileError` for a
    table that cannot be read.
    """
    if _assumed:
        return _assumed[-1]
    asked = [math.log2(max(size, 1)) for size in (tokens, outputs, inner)]
    near: list[tuple[float, float]] = []
    for point in _table().get(gpu, ()):
        if point["template"] == template:
            sizes = [
                math.log2(size) for size in (point["tokens"], point["outputs"], point["inner"])
            ]
            apart = [abs(a - b) for a, b in zip(sizes, asked, strict=True)]
            if max(apart) <= _NEAR:
                near.append((math.hypot(*apart), -point["ratio"]))
    return -min(near)[1] if near else None


@contextmanager
def assume(value: float) -> Iterator[None]:
    """Answer with one ratio in the block: a benchmark can time a template that no measurement
    speaks for yet."""
    _assumed.append(value)
    try:
        yield
    finally:
        _assumed.pop()


def key() -> str:
    """What answers depend on, as a string for cache keys. Raises as `ratio` does."""
    return f"measured={json.dumps(_table(), sort_keys=True)},assumed={_assumed[-1:]}"


def known_gpus() -> list[str]:
    """The names of the GPUs that the table holds. Raises as `ratio` does."""
    return list(_table())


def _path() -> Path:
    return kernel_table() or SHIPPED


def _table() -> dict[str, list[_Point]]:
    path = _path()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        table.pop(PROVENANCE, None)
        for points in table.values():
            for point in points:
                sizes = [point[name] for name in ("tokens", "outputs", "inner", "ratio")]
                if not isinstance(point["template"], str) or not all(size > 0 for size in sizes):
                    raise ValueError(f"got the point {point}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CompileError(
            f"{path} is no table of measured kernels: {error!r}; make it with "
            f"'python -m benchmarks.gpu', or unset {KERNEL_TABLE}"
        ) from error
    return table  # type: ignore[no-any-return]
