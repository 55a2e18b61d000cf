"""Tiles of the templates, and the rules that pick one without a benchmark.

A tile is BLOCK_M tokens x BLOCK_N outputs, walked in steps of BLOCK_K. Both lists hold only tiles
that compile without spills for bf16 on sm_80, sm_90 and sm_100 (but for a few of a sum of three,
with the widest, on sm_80): ``benchmarks/results/cubins.json`` has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Kept channels should be a multiple of this, or loads of activations are scalar.
CHANNEL_MULTIPLE = 16


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: block sizes, depth of the load pipeline, warps per program."""

    m: int
    n: int
    k: int
    stages: int
    warps: int

    @property
    def name(self) -> str:
        """``"128x64x64/s3/w4"``."""
        return f"{self.m}x{self.n}x{self.k}/s{self.stages}/w{self.warps}"


# Largest first: `pick` takes the first that gives every multiprocessor a program.
OUT_SLICED = (
    Tile(128, 256, 64, 3, 8),
    Tile(128, 128, 64, 3, 8),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 64, 64, 5, 4),
    Tile(16, 64, 64, 5, 4),
)
# The address of a gathered row depends on a load in the loop, which halves the pipeline: 5 stages
# make 3 buffers.
REDUCTION_SLICED = (
    Tile(128, 256, 64, 5, 8),
    Tile(128, 128, 64, 5, 8),
    Tile(128, 64, 64, 5, 4),
    Tile(64, 128, 64, 5, 4),
    Tile(64, 64, 64, 5, 4),
    Tile(32, 64, 64, 5, 2),  # with 4 warps it spills on sm_100
    Tile(16, 64, 64, 5, 4),
)
TILES = {"out_sliced": OUT_SLICED, "reduction_sliced": REDUCTION_SLICED}


def tiles(template: str, itemsize: int, shared_bytes: int) -> list[Tile]:
    """The tiles of a template for elements of ``itemsize`` bytes that fit into a multiprocessor's
    shared memory."""
    wide = itemsize > 2
    sized = [replace(tile, k=tile.k // 2) if wide else tile for tile in TILES[template]]
    return [tile for tile in sized if shared_upper_bound(template, tile, itemsize) <= shared_bytes]


def shared_upper_bound(template: str, tile: Tile, itemsize: int) -> int:
    """Bytes of shared memory a program may need: a block of both operands per buffer, plus 4 KiB.

    ``benchmarks/results/cubins.json`` holds what compiled kernels really use.
    """
    buffers = tile.stages if template == "out_sliced" else (tile.stages + 1) // 2
    return buffers * (tile.m + tile.n) * tile.k * itemsize + 4096


def pick(candidates: list[Tile], tokens: int, outputs: int, multiprocessors: int) -> Tile:
    """The largest tile that still gives every multiprocessor a program; the smallest fitting one if
    none does.

    Tiles taller than the tokens (rounded up to a power of two) are passed over: their rows would be
    computed in vain.
    """
    tallest = max(16, 1 << max(0, tokens - 1).bit_length())
    usable = [tile for tile in candidates if tile.m <= tallest] or candidates[-1:]
    for tile in usable:
        if -(-tokens // tile.m) * -(-outputs // tile.n) >= multiprocessors:
            return tile
    return usable[-1]
