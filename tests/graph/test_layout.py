"""The layout algebra against tensors: where a layout says row r is, the tensor holds r."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparselora_fx.graph.layout import (
    Atom,
    ChannelMap,
    Layout,
    channel_map,
    merge_atoms,
    same_count,
    same_shape,
    split_atoms,
)
from tests.support.layouts import rows_held

ROWS = 24
START = (2, 3, ROWS)


def rows() -> Tensor:
    """What a linear ``[2, 3, 24]`` returns, with the row of its weight in place of each value."""
    return torch.arange(ROWS).expand(START).clone()


Step = tuple[Callable[[Tensor], Tensor], Callable[[Layout], Layout | None]]
STEPS: dict[str, Step] = {
    "heads": (lambda x: x.reshape(2, 3, 4, 6), lambda o: o.reshape((2, 3, 4, 6))),
    "tokens": (lambda x: x.reshape(6, ROWS), lambda o: o.reshape((6, ROWS))),
    "back": (
        lambda x: x.reshape(2, 3, 4, 6).permute(0, 2, 1, 3),
        lambda o: o.reshape((2, 3, 4, 6)).permute((0, 2, 1, 3)),  # type: ignore[union-attr]
    ),
    "merged again": (
        lambda x: x.reshape(2, 3, 4, 6).transpose(2, 3).reshape(2, 3, ROWS),
        lambda o: o.reshape((2, 3, 4, 6)).permute((0, 1, 3, 2)).reshape(START),  # type: ignore[union-attr]
    ),
    "slice": (lambda x: x[..., 5:17:3], lambda o: o.slice(2, 5, 4, 3)),
    "slice of tokens": (lambda x: x[:, 1:], lambda o: o.slice(1, 1, 2)),
    "slice of a group": (
        lambda x: x.reshape(2, 3, 4, 6).transpose(2, 3).reshape(2, 3, ROWS)[..., 8:16],
        lambda o: o.reshape((2, 3, 4, 6))  # type: ignore[union-attr]
        .permute((0, 1, 3, 2)).reshape(START).slice(2, 8, 8),
    ),
    "one": (lambda x: x[..., 7], lambda o: o.slice(2, 7, 1).drop(2)),  # type: ignore[union-attr]
    "new axis": (lambda x: x[:, None], lambda o: o.insert(1)),
    "repeat_kv": (
        lambda x: x.reshape(2, 3, 4, 6)[:, :, :, None].expand(2, 3, 4, 5, 6).reshape(2, 3, 20, 6),
        lambda o: o.reshape((2, 3, 4, 6)).insert(3)  # type: ignore[union-attr]
        .expand((2, 3, 4, 5, 6)).reshape((2, 3, 20, 6)),
    ),
    "repeat_interleave": (
        lambda x: x.reshape(2, 3, 4, 6).repeat_interleave(2, dim=2),
        lambda o: o.reshape((2, 3, 4, 6)).repeat_inner(2, 2),  # type: ignore[union-attr]
    ),
    "repeat": (lambda x: x.repeat(1, 2, 3), lambda o: o.repeat_outer((1, 2, 3))),
    "repeat in front": (lambda x: x.repeat(2, 1, 1, 1), lambda o: o.repeat_outer((2, 1, 1, 1))),
    "broadcast": (lambda x: x.expand(5, *START), lambda o: o.expand((5, *START))),
    "index_select": (
        lambda x: x.index_select(2, torch.tensor([4, 5, 12, 13, 20, 21])),
        lambda o: o.take(2, 4, (Atom(3, 8), Atom(2, 1))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_layout_says_where_each_row_is(name: str) -> None:
    tensor, step = STEPS[name]
    layout = step(Layout.of_linear(START))
    assert layout is not None
    assert torch.equal(rows_held(layout), tensor(rows()))


@pytest.mark.parametrize("seed", range(20))
def test_chains_of_moves(seed: int) -> None:
    """Random reshapes, permutations, slices and repeats, one behind the other. Where the algebra
    gives up it says so; where it answers, it is right."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    x, layout = rows(), Layout.of_linear(START)
    answered = 0
    for _ in range(6):
        kind, rank = pick(4), x.dim()
        axis = pick(rank)
        new: Layout | None
        if kind == 0:
            order = torch.randperm(rank, generator=generator).tolist()
            x, new = x.permute(order), layout.permute(order)
        elif kind == 1:
            size = x.shape[axis]
            cut = next((n for n in (2, 3, 4) if size % n == 0 and size > n), size)
            shape = [*x.shape[:axis], cut, size // cut, *x.shape[axis + 1 :]]
            x, new = x.reshape(shape), layout.reshape(shape)
        elif kind == 2 and rank > 1:
            at = min(axis, rank - 2)
            shape = [*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :]]
            x, new = x.reshape(shape), layout.reshape(shape)
        else:
            start = pick(x.shape[axis])
            length = x.shape[axis] - start
            x, new = x.narrow(axis, start, length), layout.slice(axis, start, length)
        if new is None:
            break
        layout = new
        answered += 1
        assert torch.equal(rows_held(layout), x)
    assert answered > 0


@pytest.mark.parametrize(
    "step",
    [
        lambda o: o.reshape((2, 3, 5, 5)),  # another count
        lambda o: o.reshape((3, 2, ROWS)),  # atoms would mix
        lambda o: o.reshape((2, 3, 4, 6)).permute((0, 1, 3, 2)).reshape(START).slice(2, 3, 8),
        lambda o: o.repeat_outer((2,)),
        lambda o: o.take(0, 0, (Atom(2, 1),)),  # tokens
    ],
)
def test_what_is_no_affine_map_has_no_layout(step: Callable[[Layout], Layout | None]) -> None:
    assert step(Layout.of_linear(START)) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokens", (ROWS, ChannelMap(1, 1, 0))),
        ("slice", (4, ChannelMap(1, 3, 5))),
        ("slice of tokens", (ROWS, ChannelMap(1, 1, 0))),
        ("merged again", None),  # stride 1 is not the innermost
        ("heads", None),  # rows along two dimensions
        ("repeat_interleave", None),  # rows twice
    ],
)
def test_channel_maps(name: str, expected: tuple[int, ChannelMap] | None) -> None:
    layout = STEPS[name][1](Layout.of_linear(START))
    assert layout is not None
    assert channel_map(layout) == expected
    if expected is not None:
        line = rows_held(layout).flatten(0, -2)[0].tolist()
        assert expected[1].rows(expected[0]) == line


def test_a_map_of_interleaved_groups() -> None:
    """Rows of fused heads ``[4, (k, v), 3]``: the v of each head."""
    layout = Layout.of_linear((5, ROWS)).reshape((5, 4, 2, 3))
    assert layout is not None
    sliced = layout.slice(2, 1, 1)
    assert sliced is not None
    flat = sliced.drop(2).reshape((5, 12))
    assert flat is not None
    assert channel_map(flat) == (12, ChannelMap(3, 6, 3))
    assert ChannelMap(3, 6, 3).rows(12) == rows_held(flat)[0].tolist()


def test_atoms_merge_and_split() -> None:
    assert merge_atoms([Atom(4, 6), Atom(1, 9), Atom(6, 1)]) == [Atom(24, 1)]
    assert merge_atoms([Atom(2, None), Atom(3, None)]) == [Atom(2, None), Atom(3, None)]
    assert merge_atoms([Atom(2, 0), Atom(3, 0)]) == [Atom(2, 0), Atom(3, 0)]
    assert split_atoms([Atom(24, 1)], 6) == ((Atom(4, 6),), (Atom(6, 1),))
    assert split_atoms([Atom(4, 6), Atom(6, 1)], 12) == ((Atom(2, 12),), (Atom(2, 6), Atom(6, 1)))
    assert split_atoms([Atom(4, 1)], 3) is None


def symbols() -> tuple[torch.SymInt, torch.SymInt]:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    made = []
    for name, hint in (("b", 5), ("l", 5)):
        source = ConstantSource(name)
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC,
                                   constraint_dim=None)  # fmt: skip
        made.append(env.create_symintnode(symbol, hint=hint, source=source))
    return made[0], made[1]


def test_sizes_that_agree_this_once_are_not_the_same() -> None:
    """Symbolic sizes are compared as expressions: no guard, and no accident of one batch."""
    b, n = symbols()
    assert b.node.hint == n.node.hint
    assert same_shape((b, 4), (b, 4)) and not same_shape((b, 4), (n, 4))
    assert same_count((b, n), (n * b,)) and not same_count((b,), (n,))
    assert not b.node.shape_env.guards  # nobody has asked


def test_layouts_of_symbolic_sizes() -> None:
    b, n = symbols()
    layout = Layout.of_linear((b, n, ROWS)).reshape((b * n, 4, 6))
    assert layout is not None
    assert layout.is_token(0)
    back = layout.reshape((b, n, ROWS))
    assert back is not None and channel_map(back) == (ROWS, ChannelMap(1, 1, 0))
