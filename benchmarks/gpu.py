"""Time the sliced matmuls on an NVIDIA GPU: template (with the tile that benchmarks best, and with
the one that a rule picks), fallback (index_select + cuBLAS) and dense.

    python -m benchmarks.gpu                 adds this card in under 90 seconds: what
                                             decides first, then as many other cells as the time
                                             allows
    python -m benchmarks.gpu --minutes 8     everything; what is not reached stays "not
    measured"

It writes ``benchmarks/results/gpu.json`` and ``gpu.md``, and to
``sparselora_fx/lowering/measured.json`` what decides between the picked tile and the fallback where
nothing is benchmarked.

Two tables. Kernels: one op alone, over tokens, model shapes and sparsities. Regions: forward and
backward of a feed-forward or attention region, compiled as training compiles it. The share of the
roofline is ``floor / time``, where ``floor`` is the larger of FLOPs / (best rate seen) and bytes /
(best bandwidth seen); both ceilings are measured first, on the same GPU, with a square bf16 matmul
and a copy.

Without a GPU every cell says "not measured".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.support.gpu_regions import MODELS, build, kept
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import inductor, inductor_backend, measured

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
LONGEST = 20.0  # seconds that benchmarking every tile of one row may take
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
SPARSITIES = (0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
# An answer holds within a factor of two of each size: these rows cover 512 to 8192 tokens, 2048 to
# 8192 hidden channels and 96 to 7168 kept ones.
DECIDING = {"model": ("Llama-3-8B",), "tokens": (1024, 4096), "sparsity": SPARSITIES[2:]}
KINDS = ("template", "picked", "fallback", "dense")
DTYPE = torch.bfloat16
DEVICE = "cuda"
# The choices that Inductor may benchmark: one kind of ours, and any of other matmuls.
CHOICES = {"template": "triton_sparselora|^(?!.*sparselora)", "fallback": "^(?!triton_sparselora)"}
TEMPLATES = {"sliced_linear": "out_sliced", "sliced_linear_in": "reduction_sliced"}


def kernel_cases() -> Iterator[dict[str, Any]]:
    """Every row of the kernel table; its times are filled in later."""
    for tokens in TOKENS:
        for model in MODELS:
            for sparsity in SPARSITIES:
                for op in ("sliced_linear", "sliced_linear_in"):
                    yield _row(op, "ffn", model, tokens, sparsity)


def deciding(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the kernel table that the choice on a card needs most."""
    return [row for row in rows if all(row[key] in values for key, values in DECIDING.items())]


def region_cases() -> Iterator[dict[str, Any]]:
    """Every row of the region table."""
    for tokens in (512, 4096, 16384):
        for model in MODELS:
            for kind, levels in (("ffn", (0.5, 0.9, 0.97)), ("attention", (0.5, 0.75))):
                for sparsity in levels:
                    yield _row(f"{kind} forward+backward", kind, model, tokens, sparsity)


def _row(what: str, kind: str, model: str, tokens: int, sparsity: float) -> dict[str, Any]:
    times = {f"{kind}_ms": NOT_MEASURED for kind in KINDS}
    return {
        "what": what,
        "model": model,
        "tokens": tokens,
        "sparsity": sparsity,
        "kept": kept(kind, MODELS[model], sparsity),
        **times,
    }


# ---------------------------------------------------------------- measuring


def milliseconds(fn: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a call by CUDA events, with the L2 cache flushed before each call."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def ceilings() -> dict[str, float]:
    """Best matmul rate (TFLOP/s, bf16) and copy bandwidth (GB/s, read + written) of this GPU."""
    side = 8192
    a = torch.randn(side, side, device=DEVICE, dtype=DTYPE)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * side**3 / milliseconds(lambda: a @ a) / 1e9
    bandwidth = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
    return {"tflops": round(rate, 1), "gigabytes_per_second": round(bandwidth, 1)}


def roofline(row: dict[str, Any], ceiling: dict[str, float]) -> float:
    """The least time that one op of a row can take, in milliseconds: FLOPs or bytes, whichever
    needs longer.

    FLOPs: ``2 T D k``. Bytes: x, the kept rows of w and y, each once, in bf16.
    """
    d, tokens, rows = MODELS[row["model"]].hidden, row["tokens"], row["kept"]
    compute = 2 * tokens * d * rows / ceiling["tflops"] / 1e9
    memory = 2 * (tokens * d + d * rows + tokens * rows) / ceiling["gigabytes_per_second"] / 1e6
    return max(compute, memory)


def compiled(fn: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """``fn`` compiled as training compiles it, if ours are of one kind."""
    patches = inductor.only_choices(CHOICES[kind]) if kind in CHOICES else {}

    def backend(gm: Any, inputs: Any) -> Any:
        return inductor_backend.backend_compile(
            "inductor", gm, inputs, rewritten=True, patches=patches
        )

    torch.compiler.reset()
    call = torch.compile(fn, backend=backend, dynamic=False)
    if kind != "picked":
        return call

    def picked(*args: Any) -> Any:
        with measured.assume(0.0):  # as if the template had been measured to be the faster one
            return call(*args)

    return picked


def kernel_call(row: dict[str, Any], kind: str) -> Callable[[], Any]:
    """The op of a row, compiled for a kind of choice, as a call without arguments."""
    d, i = MODELS[row["model"]].hidden, MODELS[row["model"]].ffn
    into = row["what"] == "sliced_linear_in"
    x = torch.randn(row["tokens"], row["kept"] if into else d, device=DEVICE, dtype=DTYPE)
    w = torch.randn(i, d, device=DEVICE, dtype=DTYPE)
    w = w.t() if into else w  # channel-major, as compile lays out consumers
    idx = torch.randperm(i, device=DEVICE)[: row["kept"]].sort().values
    op = getattr(OPS, row["what"]).default
    full = torch.randn(row["tokens"], i if into else d, device=DEVICE, dtype=DTYPE)
    if kind == "dense":
        return partial(F.linear, full, w)
    return partial(compiled(lambda a, b, c: op(a, b, c), kind), x, w, idx)


def measure_choice(row: dict[str, Any], kinds: Sequence[str] = ("picked", "fallback")) -> None:
    """Fill in some times of one op; by default the two that decide."""
    with torch.no_grad():
        for kind in kinds:
            row[f"{kind}_ms"] = round(milliseconds(kernel_call(row, kind)), 4)


def measure_kernel(row: dict[str, Any], ceiling: dict[str, float]) -> None:
    """Fill in the times of one op that are missing, and its faster form's roofline share."""
    measure_choice(row, [kind for kind in KINDS if row[f"{kind}_ms"] == NOT_MEASURED])
    best = min(row["template_ms"], row["fallback_ms"])
    row["roofline_share"] = round(roofline(row, ceiling) / best, 3)


def measure_region(row: dict[str, Any], ceiling: dict[str, float]) -> None:
    """Fill in the times of forward + backward to x."""
    kind, shape = row["what"].partition(" ")[0], MODELS[row["model"]]
    region = build(kind, shape, row["sparsity"], DEVICE, DTYPE)
    lead = (row["tokens"],) if kind == "ffn" else (row["tokens"] // shape.length, shape.length)
    x = torch.randn(*lead, shape.hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
    cotangent = torch.randn_like(x)
    for choice in KINDS:
        call = compiled(region.dense if choice == "dense" else region.sliced, choice)

        def step(call: Callable[..., Any] = call) -> None:
            torch.autograd.grad(call(x), x, cotangent)

        row[f"{choice}_ms"] = round(milliseconds(step), 4)


# ---------------------------------------------------------------- writing


def hardware() -> dict[str, str]:
    """What the numbers hold for: GPU, versions, commit."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else NOT_MEASURED
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if importlib.util.find_spec("triton") is not None:
        versions["triton"] = importlib.metadata.version("triton")
    made = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    return {"gpu": gpu, **made, **versions, "commit": commit}


def run(minutes: float) -> dict[str, Any]:
    """Measure until the time is up: first what decides, then regions and kernels in turns, so that
    neither table stays empty."""
    kernels, regions = list(kernel_cases()), list(region_cases())
    found: dict[str, Any] = {"hardware": hardware(), "ceilings": NOT_MEASURED}
    found |= {"kernels": kernels, "regions": regions}
    if not torch.cuda.is_available():
        return found
    end = time.monotonic() + 60 * minutes
    for row in deciding(kernels):
        if time.monotonic() > end:
            return found
        measure_choice(row)
        print(row, flush=True)
    random.Random(0).shuffle(kernels := kernels[:])  # so that any part of them covers all sizes
    ceiling = found["ceilings"] = ceilings()
    step = max(1, len(kernels) // len(regions))
    for turn, region in enumerate(regions):
        todo = [(measure_region, region)]
        todo += [(measure_kernel, row) for row in kernels[turn * step : (turn + 1) * step]]
        for measure, row in todo:
            if time.monotonic() > end - LONGEST:
                return found
            measure(row, ceiling)
            print(row, flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["# Sliced matmuls on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in found["hardware"].items()]
    lines += [f"- ceilings: {found['ceilings']}", "", "Times in milliseconds, bf16."]
    for name in ("kernels", "regions"):
        columns = ["what", "model", "tokens", "sparsity", "kept", *(f"{k}_ms" for k in KINDS)]
        columns += ["roofline_share"] if name == "kernels" else []
        lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        for row in found[name]:
            cells = (str(row.get(column, NOT_MEASURED)) for column in columns)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the kernel table says to `sparselora_fx.lowering.measured`."""
    measurements = []
    for row in found["kernels"]:
        if row["fallback_ms"] != NOT_MEASURED:
            sizes = [row["kept"], MODELS[row["model"]].hidden]
            outputs, inner = sizes if row["what"] == "sliced_linear" else reversed(sizes)
            point = {"template": TEMPLATES[row["what"]], "op": row["what"]}
            point |= {"tokens": row["tokens"]}
            ratio = round(row["picked_ms"] / row["fallback_ms"], 3)
            measurements.append({**point, "outputs": outputs, "inner": inner, "ratio": ratio})
    return measurements


def update(path: Path, found: dict[str, Any]) -> None:
    """Write the points of a GPU that was measured into a table of several, in place of its own."""
    if known := points(found):
        table = json.loads(path.read_text(encoding="utf-8"))
        hardware = dict(found["hardware"])
        gpu = hardware.pop("gpu")
        table[gpu] = known
        table.setdefault(measured.PROVENANCE, {})[gpu] = hardware | {"dtype": str(DTYPE)[6:]}
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, then write the files."""
    parser = argparse.ArgumentParser(description="Time the sliced matmuls on an NVIDIA GPU.")
    parser.add_argument("--minutes", type=float, default=1.2)
    found = run(parser.parse_args().minutes)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "gpu.md").write_text(table(found), encoding="utf-8")
    update(measured.SHIPPED, found)
    print(f"wrote {RESULTS / 'gpu.json'} and gpu.md")


if __name__ == "__main__":
    main()
