"""Rows and columns of packed matrices are those of the whole matrix, as the quantisers say it."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from sparselora_fx.model import unpacking
from sparselora_fx.model.unpacking import Layout, by_column, unpack, unpack_columns, unpack_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def four_bits(
    n: int, k: int, kind: str = "nf4", block: int = 64, double: bool = False
) -> tuple[Tensor, list[Tensor], Layout, Tensor]:
    """A random matrix: packed, what it means, and its values in fp32 as bitsandbytes makes them."""
    packed, state = bnb.quantize_4bit(
        torch.randn(n, k), blocksize=block, quant_type=kind, compress_statistics=double
    )
    held = [state.code, state.absmax]
    if double:
        held += [state.state2.absmax, state.state2.code, state.offset]
    state.shape = torch.Size([n * k])  # as one row: blocks may cross those of the matrix
    whole = bnb.dequantize_4bit(packed, state).view(n, k)
    return packed, held, Layout(kind, n, k, block), whole


def chosen(n: int) -> Tensor:
    return torch.randperm(n)[: max(1, n // 3)].sort().values


def check(packed: Tensor, held: list[Tensor], layout: Layout, whole: Tensor) -> None:
    """Whole, rows and columns, with and without a copy by column, bit for bit."""
    rows, columns = chosen(layout.n), chosen(layout.k)
    copied = by_column(packed, layout)
    assert copied is None or copied.nbytes == packed.nbytes
    for dtype in DTYPES:
        expected = whole.to(dtype)
        assert torch.equal(unpack(packed, held, layout, dtype), expected)
        assert torch.equal(unpack_rows(packed, held, layout, rows, dtype), expected[rows])
        wanted = expected[:, columns].t()
        assert torch.equal(unpack_columns(packed, held, layout, columns, dtype), wanted)
        if copied is not None:
            turned = layout._replace(by_column=True)
            assert torch.equal(
                unpack_columns(packed, [*held, copied], turned, columns, dtype), wanted
            )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(48, 128, 64), (33, 256, 128), (40, 96, 64), (24, 36, 64)]
)
def test_four_bits(n: int, k: int, block: int, kind: str, double: bool) -> None:
    torch.manual_seed(n + k)
    check(*four_bits(n, k, kind, block, double))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("tall", "wide"), [(1, 40), (1, 8), (24, 40), (16, 16), (7, 3)])
def test_tiles(stored: torch.dtype, tall: int, wide: int) -> None:
    torch.manual_seed(tall)
    n, k = 24, 40
    packed = torch.randint(-128, 128, (n, k)).to(stored)
    shape = (-(-n // tall), -(-k // wide))
    scales, zeros = torch.rand(shape) + 0.5, torch.randint(-3, 4, shape).float()

    def spread(tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(tall, 0)[:n].repeat_interleave(wide, 1)[:, :k]

    layout = Layout("scaled", n, k, wide, tall)
    check(packed, [scales], layout, packed.float() * spread(scales))
    shifted = (packed.float() - spread(zeros)) * spread(scales)
    check(packed, [scales, zeros], layout._replace(kind="shifted"), shifted)


def test_only_what_is_kept_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    kernel = unpacking._kernel

    def counting(*args: object) -> Tensor:
        values = kernel(*args)  # type: ignore[arg-type]
        made.append(values.numel())
        return values

    monkeypatch.setattr(unpacking, "_kernel", counting)
    packed, held, layout, _ = four_bits(64, 128)
    idx = torch.tensor([3, 5, 60])
    unpack_rows(packed, held, layout, idx, torch.float32)
    copied = by_column(packed, layout)
    assert copied is not None
    turned = layout._replace(by_column=True)
    unpack_columns(packed, [*held, copied], turned, idx, torch.float32)
    assert made == [3 * 128, 3 * 64]


def test_a_layout_is_read_back() -> None:
    for layout in (Layout("nf4", 3, 4, 64), Layout("shifted", 5, 6, 2, 3, by_column=True)):
        assert Layout.decode(layout.encode()) == layout
