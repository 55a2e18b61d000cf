"""Whether rows stand in the order of the batch's tokens, where shapes do not say it: as many
samples as tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.regions import FOREIGN, IN_ORDER, MOVED, SWAPPED, UNKNOWN
from sparselora_fx.analysis.token_order import token_inputs, token_orders
from tests.support.small_graphs import Small

Build = Callable[[Small, fx.Node], fx.Node]
ORDERS: dict[str, tuple[Build, str]] = {
    "as they are": (lambda s, x: s.call(F.layer_norm, x, (8,)), IN_ORDER),
    "flattened": (lambda s, x: s.call("reshape", x, 9, 8), IN_ORDER),
    "swapped": (lambda s, x: s.call("transpose", x, 0, 1), SWAPPED),
    "swapped, flattened": (
        lambda s, x: s.call("reshape", s.call("transpose", x, 0, 1), 9, 8), SWAPPED,
    ),
    "swapped twice": (
        lambda s, x: s.call("transpose", s.call("transpose", x, 0, 1), 0, 1), IN_ORDER,
    ),
    "reversed": (lambda s, x: s.call("flip", x, [1]), MOVED),
    "channels reversed": (lambda s, x: s.call("flip", x, [2]), UNKNOWN),
    "rolled": (lambda s, x: s.call("roll", x, 1, 1), MOVED),
    "beside its reverse": (
        lambda s, x: s.call(torch.add, x, s.call("flip", x, [1])), IN_ORDER,
    ),
    "handed on": (lambda s, x: s.input("hidden", 3, 3, 8), UNKNOWN),
    "a residual handed on": (lambda s, x: s.call(torch.add, x, s.input("h", 3, 3, 8)), IN_ORDER),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str) -> None:
    build, order = ORDERS[name]
    small = Small()
    ids = small.input("ids", 3, 3, dtype=torch.int64)
    x = small.call(F.embedding, ids, small.weight("table", 11, 8))
    mark = small.marked(build(small, x), small.input("w", 4, 8))
    assert token_orders(small.gm, frozenset({ids})) == {mark: order}


def second_text(small: Small, given: fx.Node) -> fx.Node:
    return small.call(F.embedding, given, small.weight("table", 11, 8))


def convolved(small: Small, given: fx.Node) -> fx.Node:
    pixels = small.call("to", given, torch.float64)
    found = small.call(
        F.conv1d, small.call("unsqueeze", pixels, 1), small.weight("kernel", 8, 1, 1)
    )
    return small.call("transpose", found, 1, 2)


@pytest.mark.parametrize("build", [second_text, convolved])
def test_rows_of_what_else_the_caller_gave_are_foreign(build: Build) -> None:
    """As many rows as tokens, and none of the batch; what another part of the model may have
    computed is not known; what the batch goes into is told by its own way."""
    for given, added, order in (
        (True, False, FOREIGN), (False, False, UNKNOWN), (True, True, IN_ORDER),
    ):  # fmt: skip
        small = Small()
        ids, other = (small.input(n, 3, 3, dtype=torch.int64) for n in ("ids", "other"))
        rows = build(small, other)
        if added:
            x = small.call(F.embedding, ids, small.weight("words", 11, 8))
            rows = small.call(torch.add, x, rows)
        first = small.marked(rows, small.input("w", 8, 8), tokens=(small.input("list", 3, 3),))
        second = small.marked(small.call("relu", first), small.input("v", 4, 8))
        found = token_orders(small.gm, frozenset({ids}), frozenset({other} if given else ()))
        assert found == {first: order, second: order}
        assert set(token_orders(small.gm, frozenset()).values()) == {UNKNOWN}


def test_through_a_body() -> None:
    """A checkpointed block reads what the graph hands it, and hands on what it returns."""
    inner = Small()
    h = inner.input("h", 3, 3, 8)
    first = inner.marked(h, inner.input("w", 8, 8))
    inner.graph.output((inner.call("transpose", first, 0, 1),))
    inner.gm.recompile()
    small = Small()
    x = small.input("inputs_embeds", 3, 3, 8)
    small.gm.body = inner.gm
    body = small.graph.get_attr("body")
    operands = [x, *(small.input(n.name, *n.meta["example_value"].shape)
                     for n in inner.graph.find_nodes(op="placeholder")[1:])]  # fmt: skip
    hop = torch.ops.higher_order.tag_activation_checkpoint
    call = small.graph.call_function(hop, (body, *operands))
    out = small.graph.call_function(operator.getitem, (call, 0))
    out.meta["example_value"] = x.meta["example_value"]
    second = small.marked(out, small.input("v", 4, 8))
    orders = token_orders(small.gm, frozenset({x}))
    assert orders == {first: IN_ORDER, second: SWAPPED}


def test_inputs_are_known_by_identity() -> None:
    small = Small()
    ids, mask, other = (small.input(n, 2, 3, dtype=torch.int64) for n in ("a", "b", "c"))
    tensors = [torch.zeros(2, 3, dtype=torch.int64) for _ in range(3)]
    arguments = {"input_ids": tensors[0], "attention_mask": tensors[1]}
    batch, passed = token_inputs(small.gm, tensors, arguments)
    assert batch == {ids} and passed == {ids, mask} and other not in passed
