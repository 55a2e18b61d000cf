"""Compile the templates for NVIDIA GPUs, without one, and record what the compiler made of them.

    python -m benchmarks.cubins            prints a table and writes
    benchmarks/results/cubins.json python -m benchmarks.cubins --tile 128x128x64/s3/w8
    --arch 90     one tile; writes nothing

Each kernel is what Inductor generates for one op alone on bf16 tensors of `SHAPE`, weights
channel-major. ptxas and the disassemblers come with triton. Registers, spills and shared memory are
facts about the binary, not about speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sparselora_fx.lowering import configs
from sparselora_fx.lowering.configs import TILES, Tile
from sparselora_fx.lowering.triton import FAMILIES
from tests.support.offgpu_backend import FakeGPU, compile_kernel

RESULTS = Path(__file__).parent / "results" / "cubins.json"
ARCHITECTURES = (80, 90, 100)
SHAPE = {"tokens": 4096, "inputs": 4096, "outputs": 14336, "kept": 1408}


OPS = {
    **{op: family.template for op, family in FAMILIES.items()},
    "sliced_linears": "out_sliced",  # of two weights
    "sliced_linear_dgrads": "reduction_sliced",  # a sum of three
    "topk_rows": "topk_channels",
}
ROWS = "rows"  # what cuts the work of `topk_rows`, which has no tile


def tiles_of(op: str) -> dict[str, Tile | None]:
    """How an op's work may be cut, by name."""
    if op == "topk_rows":
        return {ROWS: None}
    return {tile.name: tile for tile in TILES[OPS[op]]}


def record(op: str, tile: str, arch: int) -> dict[str, Any]:
    """Compile one op with one tile for one architecture and describe the binary."""
    name, source = _generate(op, tiles_of(op)[tile], arch)
    kernel = compile_kernel(name, source, arch)
    return {
        "kernel": op,
        "arch": f"sm_{arch}",
        "tile": tile,
        "shared_bytes": int(kernel.metadata.shared),
        **_facts(kernel.asm["cubin"]),
    }


def _generate(op: str, tile: Tile | None, arch: int) -> tuple[str, str]:
    """Name and source of the kernel that Inductor generates for the op alone."""
    import torch

    torch.compiler.reset()
    gpu = FakeGPU(arch=arch, choice="picked", execute=False)
    with torch.no_grad(), patch.object(configs, "pick", lambda *_: tile):
        torch.compile(_alone(op), backend=gpu)(*_inputs(op))
    (kernel,) = gpu.kernels
    return kernel


def _alone(op: str) -> Callable[..., Any]:
    import torch

    from sparselora_fx.ir import joint_ops

    assert joint_ops.LIBRARY is not None  # importing it registers the ops
    overload = getattr(torch.ops.sparselora, op).default
    return lambda *given: overload(*given)


def _facts(cubin: bytes) -> dict[str, Any]:
    """Registers per thread; spill instructions; wgmma instructions; 16-byte copies from global to
    shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "registers": int(registers[1]),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "wgmma": count(r"\bHGMMA\b"),
        "wide_gathers": count(r"\bLDGSTS[.\w]*\.128\b"),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _inputs(op: str) -> tuple[Any, ...]:
    import torch

    def bf16(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16)

    tokens, inputs, outputs = SHAPE["tokens"], SHAPE["inputs"], SHAPE["outputs"]

    def idx() -> Any:
        return torch.empty(SHAPE["kept"], dtype=torch.int64)

    def several(count: int, make: Callable[[], Any]) -> list[Any]:
        return [make() for _ in range(count)]

    x, kept = partial(bf16, tokens, inputs), partial(bf16, tokens, SHAPE["kept"])
    up, down = partial(bf16, outputs, inputs), bf16(outputs, inputs).t()
    return {
        "sliced_linear": lambda: (x(), up(), idx()),
        "sliced_linear_dgrad": lambda: (kept(), up(), idx()),
        "sliced_linear_in": lambda: (kept(), down, idx()),
        "sliced_linear_in_dgrad": lambda: (x(), down, idx()),
        "sliced_linears": lambda: (x(), several(2, up), several(2, idx)),
        "sliced_linear_dgrads": lambda: (several(3, kept), several(3, up), several(3, idx)),
        "topk_rows": lambda: (torch.empty(2, outputs), SHAPE["kept"]),
    }[op]()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile the templates without a GPU.")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--tile", action="append", help="as in the table, such as 128x128x64/s3/w8")
    parser.add_argument("--json", action="store_true", help="print JSON lines; write nothing")
    return parser.parse_args()


def main() -> None:
    """Compile what was asked for; a full run is written to `RESULTS`."""
    import torch
    import triton

    asked = _arguments()
    rows = []
    for op in asked.op or OPS:
        for tile in tiles_of(op):
            if asked.tile and tile not in asked.tile:
                continue
            for arch in asked.arch or ARCHITECTURES:
                rows.append(record(op, tile, arch))
                print(json.dumps(rows[-1]) if asked.json else _line(rows[-1]), flush=True)
    if not (asked.op or asked.tile or asked.arch or asked.json):
        versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
        found = {"versions": versions, "dtype": "bfloat16", "shape": SHAPE, "kernels": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['kernel']:22} {row['arch']:6} {row['tile']:16} registers {row['registers']:3} "
        f"spills {row['spills']:3} shared {row['shared_bytes']:6} wgmma {row['wgmma']:3} "
        f"wide gathers {row['wide_gathers']:3}"
    )


if __name__ == "__main__":
    main()
