"""Data movement, on tensors of row numbers: a layout says of each position which row is there."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparselora_fx.analysis.channel_moves import order_of
from sparselora_fx.analysis.channel_values import Channels
from tests.support.layouts import rows_held
from tests.support.site_flow import ROWS, Build, flow, part
from tests.support.small_graphs import Small

MOVES: dict[str, tuple[Build, Callable[[Tensor], Tensor]]] = {
    "cast": (lambda s, y: s.call("float", y), lambda y: y),
    "view": (lambda s, y: s.call("view", y, 2, 3, 4, 3), lambda y: y.view(2, 3, 4, 3)),
    "flatten": (lambda s, y: s.call("flatten", y, 0, 1), lambda y: y.flatten(0, 1)),
    "transpose": (lambda s, y: s.call("transpose", y, 1, 2), lambda y: y.transpose(1, 2)),
    "permute": (lambda s, y: s.call("permute", y, 2, 0, 1), lambda y: y.permute(2, 0, 1)),
    "movedim": (lambda s, y: s.call(torch.movedim, y, -1, 0), lambda y: y.movedim(-1, 0)),
    "mT": (lambda s, y: s.call(getattr, y, "mT"), lambda y: y.mT),
    "slice": (part(Ellipsis, slice(2, None, 2)), lambda y: y[..., 2::2]),
    "negative start": (part(Ellipsis, slice(-4, None)), lambda y: y[..., -4:]),
    "one": (part(slice(None), 0), lambda y: y[:, 0]),
    "last": (part(Ellipsis, -1), lambda y: y[..., -1]),
    "new axis": (part(slice(None), None), lambda y: y[:, None]),
    "a list": (part(Ellipsis, [1, 3, 5]), lambda y: y[..., [1, 3, 5]]),
    "narrow": (lambda s, y: s.call("narrow", y, -1, 3, 4), lambda y: y.narrow(-1, 3, 4)),
    "select": (lambda s, y: s.call("select", y, 0, 1), lambda y: y.select(0, 1)),
    "expand": (
        lambda s, y: s.call("expand", s.call("unsqueeze", y, 0), 4, 2, 3, ROWS),
        lambda y: y[None].expand(4, 2, 3, ROWS),
    ),
    "repeat": (lambda s, y: s.call("repeat", y, 1, 1, 2), lambda y: y.repeat(1, 1, 2)),
    "repeat_interleave": (
        lambda s, y: s.call("repeat_interleave", y, 2, dim=2),
        lambda y: y.repeat_interleave(2, dim=2),
    ),
    "chunk": (
        lambda s, y: s.call(operator.getitem, s.call("chunk", y, 3, -1), 1),
        lambda y: y.chunk(3, -1)[1],
    ),
    "split": (
        lambda s, y: s.call(operator.getitem, s.call("split", y, [5, 7], -1), 1),
        lambda y: y.split([5, 7], -1)[1],
    ),
    "unbind": (
        lambda s, y: s.call(operator.getitem, s.call("unbind", y, 1), 2),
        lambda y: y.unbind(1)[2],
    ),
    "halves in turn": (
        lambda s, y: s.call(torch.cat, [part(Ellipsis, slice(6))(s, y),
                                        part(Ellipsis, slice(6, None))(s, y)], -1),
        lambda y: y,
    ),
    "pairs stacked": (
        lambda s, y: s.call(torch.stack, [part(Ellipsis, slice(0, None, 2))(s, y),
                                          part(Ellipsis, slice(1, None, 2))(s, y)], -1),
        lambda y: y.view(2, 3, 6, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    """The layout says of every position the row that a tensor of rows has there."""
    build, move = MOVES[name]
    (value,), rewrite = flow(build)
    assert isinstance(value, Channels) and value.moved
    assert value.roots == frozenset(rewrite.sites)
    (port,) = value.ports
    assert port.layout is not None
    rows = torch.arange(ROWS).expand(2, 3, ROWS)
    assert torch.equal(rows_held(port.layout), move(rows))


@pytest.mark.parametrize(
    ("call", "order"),
    [
        (lambda s, x: s.call("permute", x, 0, -1, 1), [0, 2, 1]),
        (lambda s, x: s.call("permute", x, (2, 1, 0)), [2, 1, 0]),
        (lambda s, x: s.call("transpose", x, -1, 0), [2, 1, 0]),
        (lambda s, x: s.call(torch.movedim, x, 0, 2), [1, 2, 0]),
        (lambda s, x: s.call(torch.movedim, x, (0, 1), (1, 2)), None),
    ],
)
def test_orders_of_axes(call: Callable[[Small, object], object], order: list[int] | None) -> None:
    small = Small()
    x = small.input("x", 2, 3, 4)
    node = call(small, x)
    name = "permute" if "permute" in str(node) else str(node).split("_")[0]
    found = order_of(node, name, 3)  # type: ignore[arg-type]
    assert found == order
    if found is not None:
        shape = x.meta["example_value"].shape
        made = node.meta["example_value"].shape  # type: ignore[attr-defined]
        assert [shape[axis] for axis in found] == list(made)
