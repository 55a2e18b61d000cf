"""What the compiler makes of the templates: the committed table, and samples of it compiled
again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cubins import OPS, tiles_of
from sparselora_fx.lowering.configs import shared_upper_bound
from tests.support.fake_cuda import ARCHITECTURES

pytestmark = pytest.mark.offgpu
ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/cubins.json").read_text(encoding="utf-8"))
ROWS = {(row["kernel"], row["arch"], row["tile"]): row for row in TABLE["kernels"]}


def test_every_kernel_tile_and_architecture_is_recorded() -> None:
    wanted = {(op, f"sm_{n}", tile) for op in OPS for tile in tiles_of(op) for n in ARCHITECTURES}
    assert set(ROWS) == wanted


# A sum of three with the widest tile, on an architecture that multiplies from registers.
SPILLS = {("sliced_linear_dgrads", "sm_80", "128x256x64/s5/w8"): 17}


def test_no_matmul_spills_and_all_fit() -> None:
    for (op, arch, name), row in ROWS.items():
        assert row["shared_bytes"] <= ARCHITECTURES[int(arch.removeprefix("sm_"))][1], row
        tile = tiles_of(op)[name]
        if tile is None:
            assert row["spills"] < 40, row  # a whole row of scores in one program
            continue
        assert row["spills"] == SPILLS.get((op, arch, name), 0), row
        assert row["shared_bytes"] <= shared_upper_bound(OPS[op], tile, 2), row


MATMULS = {key: row for key, row in ROWS.items() if tiles_of(key[0])[key[2]] is not None}


def test_weights_are_gathered_16_bytes_at_a_time() -> None:
    assert all(row["wide_gathers"] > 0 for row in MATMULS.values())


def test_hopper_uses_wgmma_where_a_tile_is_tall_enough() -> None:
    """wgmma works on 64 rows at a time; the two tiles for few tokens are shorter."""
    for (_, arch, tile), row in MATMULS.items():
        tall = int(tile.split("x")[0]) >= 64
        assert (row["wgmma"] > 0) == (arch == "sm_90" and tall), row


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Rows of a fresh compilation. Triton's interpreter, which the other tests use, cannot
    compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.cubins", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_table_is_what_the_compiler_says(arch: int) -> None:
    import triton

    if triton.__version__ != TABLE["versions"]["triton"]:
        pytest.skip(f"the table is for triton {TABLE['versions']['triton']}")
    tiles = ("128x128x64/s3/w8", "128x128x64/s5/w8")
    rows = compiled("--arch", str(arch), *(a for tile in tiles for a in ("--tile", tile)))
    assert len(rows) == 6
    for row in rows:
        assert row == ROWS[row["kernel"], row["arch"], row["tile"]]
