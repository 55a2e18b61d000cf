"""When a template may be used, and when it is worth trying unbenchmarked. Every rule has a name and
a sentence.

Preconditions that no rule can check while compiling (eager ops check them): ``idx`` is int64, in
range and on the device of its weight; it holds no duplicate. ``SPARSELORA_DEBUG_BOUNDS=1`` makes
the kernels assert the range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselora_fx.graph.layout import Size
from sparselora_fx.lowering.configs import CHANNEL_MULTIPLE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SWITCHED_OFF = "SPARSELORA_DISABLED_LAYERS names the templates"
NOT_CUDA = "the template is for NVIDIA GPUs"
MIXED_DEVICES = "x, w and idx are on different devices"
DTYPE = "the template computes in float16, bfloat16 or float32"
INDEX_DTYPE = "idx must be int64"
SYMBOLIC_KEPT = "the number of kept channels is symbolic; it must be fixed per region"
SYMBOLIC_WEIGHT = "the weight's shape is symbolic"
EMPTY = "a dimension is empty"

NOT_MEASURED = "no GPU of this name was measured near these sizes"
SLOWER = "the template was slower where it was measured"
RAGGED_KEPT = f"kept channels are no multiple of {CHANNEL_MULTIPLE}, so loads would be scalar"
FULL_FLOAT32 = "float32 without TF32 does not use tensor cores in the template"
STRIDED_GATHER = "the weight's gathered rows are not contiguous, so loads would be scalar"


@dataclass(frozen=True)
class Problem:
    """``y[M, N] = x[M, K] @ gathered(w)``, M tokens. ``weight`` is w's shape as stored; sizes may
    be symbolic.

    ``contiguous_rows``: one gathered row or column of w is contiguous in memory.
    """

    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    index_dtype: torch.dtype
    tokens: Size
    outputs: Size
    inner: Size
    kept: Size
    weight: tuple[Size, ...]
    contiguous_rows: bool


def ineligible(problem: Problem) -> str | None:
    """Why the templates cannot compute this, or None."""
    sizes = (problem.outputs, problem.inner, problem.kept, *problem.weight)
    rules = (
        (any(device.type != "cuda" for device in problem.devices), NOT_CUDA),
        (len(set(problem.devices)) != 1, MIXED_DEVICES),
        (problem.dtype not in DTYPES or problem.weight_dtype not in DTYPES, DTYPE),
        (problem.index_dtype != torch.int64, INDEX_DTYPE),
        (not fixed(problem.kept), SYMBOLIC_KEPT),
        (not all(fixed(size) for size in problem.weight), SYMBOLIC_WEIGHT),
        (any(fixed(size) and int(size) == 0 for size in (*sizes, problem.tokens)), EMPTY),
    )
    return next((reason for broken, reason in rules if broken), None)


def unpromising(problem: Problem, ratio: float | None) -> str | None:
    """Why gather + matmul is preferred when nothing is benchmarked, or None. For eligible problems
    only. ``ratio``: the template's time over that of gather + matmul, if measured; it was, for what
    the other rules let through."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    rules = (
        (int(problem.kept) % CHANNEL_MULTIPLE != 0, RAGGED_KEPT),
        (problem.dtype == torch.float32 and not tf32, FULL_FLOAT32),
        (not problem.contiguous_rows, STRIDED_GATHER),
        (ratio is None, NOT_MEASURED),
        (ratio is not None and ratio >= 1, SLOWER),
    )
    return next((reason for broken, reason in rules if broken), None)


def fixed(size: object) -> bool:
    """Whether a size is a number."""
    return isinstance(size, int) or bool(getattr(size, "is_number", False))
