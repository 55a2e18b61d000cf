"""Choosing channels on a GPU: one kernel, where a selection and a sort are several."""

from __future__ import annotations

import torch

from sparselora_fx.environment import disabled_layers
from sparselora_fx.graph.layout import Size
from sparselora_fx.lowering import gather_matmul, inductor, triton
from sparselora_fx.lowering.constraints import DTYPES, fixed
from sparselora_fx.lowering.inductor import Value

_MOST_CHANNELS = (
    32768  # of one program: 32 for each thread of the largest block; counted in 16 bits
)


def topk_channels(scores: Value, k: Size) -> Value:
    """``[N] -> int64[k]``: the k channels of largest score, ascending."""
    return gather_matmul.first_row(topk_rows(gather_matmul.as_row(scores), k))


def topk_rows(scores: Value, k: Size) -> Value:
    """``[R, N] -> int64[R, k]``: `topk_channels` of each row."""
    chosen = _by_template(scores, k)
    return gather_matmul.topk_then_sort(scores, k) if chosen is None else chosen


def _by_template(scores: Value, k: Size) -> Value | None:
    """A kernel of ours; None where it cannot run."""
    rows, channels = scores.get_size()
    sizes = all(map(fixed, (rows, channels, k))) and 0 < int(channels) <= _MOST_CHANNELS
    nvidia = scores.get_device().type == "cuda" and torch.version.hip is None
    if not (sizes and nvidia and scores.get_dtype() in DTYPES) or "templates" in disabled_layers():
        return None
    api = inductor.inductor()
    block = 1 << max(4, (int(channels) - 1).bit_length())
    values = api.realize_inputs(scores)
    layout = api.FixedLayout(scores.get_device(), torch.int64, [rows, k])
    choices: list[object] = []
    triton.template("topk_channels", _grid).maybe_append_choice(
        choices,
        input_nodes=[values],
        layout=layout,
        BLOCK=block,
        KEPT=int(k),
        num_stages=1,
        num_warps=min(32, max(4, block // 512)),
    )
    return inductor.select("topk_rows", choices, [values], layout, None) if choices else None


def _grid(rows: Size, kept: Size, meta: object, *, cdiv: object) -> tuple[Size, int, int]:
    """One program for each row."""
    return (rows, 1, 1)
