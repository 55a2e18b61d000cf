"""The NVIDIA lowering: two Triton templates for sliced matmuls, offered against gather + cuBLAS.

    sliced_linear            y[T, S]  = x[T, K]  @ w[idx, :].T    out_sliced         w as stored
    sliced_linear_in_dgrad   gh[T, S] = gy[T, N] @ w[:, idx]      out_sliced         w transposed
    sliced_linear_dgrad      gx[T, K] = gy[T, S] @ w[idx, :]      reduction_sliced   w as stored
    sliced_linear_in         y[T, N]  = h[T, S]  @ w[:, idx].T    reduction_sliced   w transposed
    sliced_linears           several sliced_linear of one x       out_sliced         w as stored
    sliced_linear_dgrads     a sum of sliced_linear_dgrad         reduction_sliced   w as stored

Inductor fuses pointwise neighbours into a template: what reads y into its store, gathers that make
x (a selection of token rows) into its loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import torch

from sparselora_fx.environment import check_bounds
from sparselora_fx.graph.layout import Size
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import configs, gather_matmul, inductor, measured
from sparselora_fx.lowering.constraints import Problem
from sparselora_fx.lowering.inductor import Value

TEMPLATES = Path(__file__).parent / "templates"
_GROUP_M = 8  # programs that share columns run next to each other, so that w stays in the L2 cache
_SHARED_WITHOUT_ASKING = 49152  # bytes of shared memory that every NVIDIA GPU grants a block
_INCLUDE = re.compile(r'^\{% include "([\w.]+)" %\}\n', re.MULTILINE)


@dataclass(frozen=True)
class Family:
    """How one op maps onto a template. ``transposed``: the template sees w through its
    transpose."""

    op: str
    template: str
    transposed: bool

    @property
    def gather_axis(self) -> int:
        """The dimension of w, as stored, that idx selects from."""
        return 1 if self.transposed else 0


FAMILIES = {
    family.op: family
    for family in (
        Family("sliced_linear", "out_sliced", False),
        Family("sliced_linear_dgrad", "reduction_sliced", False),
        Family("sliced_linear_in", "reduction_sliced", True),
        Family("sliced_linear_in_dgrad", "out_sliced", True),
    )
}


def read_template(name: str) -> str:
    """The source of a template with its ``{% include %}`` lines filled in."""
    text = (TEMPLATES / f"{name}.py.jinja").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: (TEMPLATES / found[1]).read_text(encoding="utf-8"), text)


def grid(*given: object, cdiv: Callable[[Size, int], Size]) -> tuple[Size, Size, int]:
    """One program per tile of y, in one dimension; the templates order them in groups of
    ``_GROUP_M`` rows. The other dimension: y of several weights. ``given``: y's sizes, and what
    the template is filled with."""
    *several, m, n = cast(list[Size], list(given[:-1]))
    meta = cast(dict[str, int], given[-1])
    tiles = cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"])
    return (tiles, several[0] if several else 1, 1)


class _Choice(Protocol):
    """A kernel that Inductor may choose."""

    def maybe_append_choice(self, choices: list[object], **how: object) -> object:
        """Add it to the choices, if it can compute this."""


@cache
def template(name: str, grid: Callable[..., tuple[Size, Size, int]]) -> _Choice:
    """A template by the name of its file. Inductor keeps template names in one registry for the
    process, so each is made once."""
    api = inductor.inductor()
    made: _Choice = api.TritonTemplate(
        name=f"sparselora_{name}", grid=api.SymbolicGridFn(grid), source=read_template(name)
    )
    return made


@cache
def _fallback(op: str) -> _Choice:
    """The op's eager kernel (index_select + cuBLAS) as a choice.

    It is called as ``torch.ops.sparselora.<op>``: a Python function here would be missing in a
    fresh process that finds the compiled graph in a cache.
    """
    overload = getattr(OPS, op).default
    made: _Choice = inductor.inductor().ExternKernelChoice(
        overload,
        name=f"sparselora_{op}_fallback",
        has_out_variant=False,
        op_overload=overload,
        use_fallback_kernel=True,
    )
    return made


def autotunes() -> bool:
    """Whether Inductor was asked to benchmark matmuls."""
    config = inductor.inductor().config
    return bool(config.max_autotune or config.max_autotune_gemm)


def measured_ratio(family: Family, problem: Problem) -> float | None:
    """`measured.ratio` of an eligible problem on its GPU; a size that varies counts as its hint."""
    sizes = (inductor.size_hint(n) for n in (problem.tokens, problem.outputs, problem.inner))
    gpu = torch.cuda.get_device_properties(problem.devices[0]).name
    return measured.ratio(gpu, family.template, *sizes)


def problem(family: Family, x: Value, w: Value, idx: Value) -> Problem:
    """Describe ``y[M, N] = x[M, K] @ gathered(w)`` from IR nodes."""
    *lead, inner = x.get_size()
    tokens: Size = 1
    for size in lead:
        tokens = tokens * size
    kept, weight = idx.get_size()[0], tuple(w.get_size())
    outputs = kept if family.template == "out_sliced" else weight[1 - family.gather_axis]
    stride = w.maybe_get_stride()
    across = None if stride is None else stride[1 - family.gather_axis]
    return Problem(
        devices=tuple(node.get_device() for node in (x, w, idx)),
        dtype=x.get_dtype(),
        weight_dtype=w.get_dtype(),
        index_dtype=idx.get_dtype(),
        tokens=tokens,
        outputs=outputs,
        inner=inner,
        kept=kept,
        weight=weight,
        contiguous_rows=across is not None and inductor.always_equal(across, 1),
    )


def lower(
    family: Family,
    problems: Sequence[Problem],
    x: Sequence[Value],
    w: Sequence[Value],
    idx: Sequence[Value],
) -> Value | None:
    """The chosen kernel's output; None if none can run.

    One problem: with the leading dimensions of x. Several, with one x: ``y[G, T, N]``, one of each
    weight. As many x: their sum, with the leading dimensions of the first.

    Every choice is given the same inputs: before torch 2.13 the fallback is benchmarked on the
    inputs of the selection, not on its own.
    """
    api = inductor.inductor()
    flat = [gather_matmul.flatten(each) for each in x]
    inputs = api.realize_inputs(*flat, *w, *idx)
    first, count = problems[0], len(problems)
    outer = [count] if len(x) < count else []
    size = [*outer, inputs[0].get_size()[0], first.outputs]
    layout = api.FixedLayout(first.devices[0], first.dtype, size)
    if not api.use_triton_template(layout, check_max_autotune=False):
        return None
    choices: list[object] = []
    if autotunes():
        _fallback(family.op).maybe_append_choice(choices, input_nodes=inputs, layout=layout)
    for tile in _tiles(family, first, count if outer else 1):
        template(family.template, grid).maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, **_constants(family, problems, tile)
        )
    if not choices:
        return None
    rows = first.weight[family.gather_axis]
    random = {len(x) + count + i: _permutation(rows) for i in range(count)}
    chosen = inductor.select(family.op, choices, list(inputs), layout, random)
    return chosen if outer else gather_matmul.unflatten(chosen, x[0])


def _tiles(family: Family, problem: Problem, weights: int) -> list[configs.Tile]:
    """All tiles that fit when benchmarking, else the one that the rule picks."""
    properties = torch.cuda.get_device_properties(problem.devices[0])
    shared = int(getattr(properties, "shared_memory_per_block_optin", _SHARED_WITHOUT_ASKING))
    found = configs.tiles(family.template, problem.dtype.itemsize, shared)
    if autotunes() or not found:
        return found
    tokens, outputs = inductor.size_hint(problem.tokens), inductor.size_hint(problem.outputs)
    return [configs.pick(found, tokens, outputs * weights, int(properties.multi_processor_count))]


def _constants(
    family: Family, problems: Sequence[Problem], tile: configs.Tile
) -> dict[str, object]:
    """What a template is filled with, by the names its legend explains."""
    problem, numbers = problems[0], range(len(problems))
    inputs = ["A"] if family.template == "out_sliced" else [f"A{i}" for i in numbers]
    return {
        "COUNT": len(problems),
        "OPERANDS": (*inputs, *(f"W{i}" for i in numbers), *(f"IDX{i}" for i in numbers)),
        "num_stages": tile.stages,
        "num_warps": tile.warps,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": _GROUP_M,
        "EVEN_K": tuple(inductor.divides(tile.k, each.inner) for each in problems),
        "W_T": family.transposed,
        "CAST_W": any(each.weight_dtype != each.dtype for each in problems),
        "CHECK_BOUNDS": check_bounds(),
        "ACC_TYPE": inductor.inductor().acc_type(problem.dtype),
        "ALLOW_TF32": torch.backends.cuda.matmul.fp32_precision == "tf32",
    }


def _permutation(rows: Size) -> Callable[[Value], torch.Tensor]:
    """Benchmark on sorted random rows, as topk_channels gives them: the default, all zeros, would
    read one row."""

    def generate(buffer: Value) -> torch.Tensor:
        kept, total = inductor.size_hint(buffer.get_size()[0]), inductor.size_hint(rows)
        return torch.randperm(total, device=buffer.get_device())[:kept].sort().values

    return generate
