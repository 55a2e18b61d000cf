"""Which rows of an activation are which tokens of the batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.row_kinds import Joined, Part, Whole
from sparselora_fx.analysis.token_rows import token_rows
from tests.support.small_graphs import Small

Build = Callable[[Small, fx.Node], fx.Node]


def rows_of(build: Build, passed: frozenset[fx.Node] = frozenset()) -> tuple[Any, fx.Node, Small]:
    """The rows of what is built of the embedded tokens ``[2, 3, 8]``."""
    small = Small()
    ids = small.input("ids", 2, 3, dtype=torch.int64)
    x = small.call(F.embedding, ids, small.input("table", 11, 8))
    end = build(small, x)
    found = token_rows(small.graph, frozenset({ids}), passed | {ids})
    return found.get(end, "nothing to do with the tokens"), end, small


KEPT: dict[str, Build] = {
    "embedded": lambda s, x: x,
    "a linear": lambda s, x: s.linear(x, s.weight("w", 4, 8)),
    "a norm and a residual": lambda s, x: s.call(torch.add, x, s.call(F.layer_norm, x, (8,))),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_works_token_by_token_keeps_its_rows(name: str) -> None:
    assert rows_of(KEPT[name])[0] == Whole()


def prompted(small: Small, x: fx.Node) -> fx.Node:
    prompt = small.call("expand", small.weight("prompt", 1, 2, 8), 2, 2, 8)
    return small.call(torch.cat, (prompt, x), 1)


def test_a_learned_prompt_in_front_and_its_removal() -> None:
    found, end, _ = rows_of(prompted)
    assert isinstance(found, Joined)
    assert found.parts == (end.args[0][0], Whole())  # type: ignore[index]

    def removed(small: Small, x: fx.Node) -> fx.Node:
        whole = prompted(small, x)
        return small.call(operator.getitem, whole, (slice(None), slice(2, None)))

    found, _, _ = rows_of(removed)
    assert isinstance(found, Part) and isinstance(found.rows, Joined)
    assert (found.start, found.stop, found.step) == (2, None, None)


UNTOLD: dict[str, Build] = {
    "rolled": lambda s, x: s.call("roll", x, 1, 1),
    "tokens mixed": lambda s, x: s.call("cumsum", x, 1),
    "tokens before samples": lambda s, x: s.call("transpose", x, 0, 1),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_told(name: str) -> None:
    assert rows_of(UNTOLD[name])[0] is None


def test_what_has_nothing_to_do_with_tokens_is_left_out() -> None:
    found, _, _ = rows_of(lambda s, x: s.call("neg", s.weight("w", 2, 8)))
    assert found == "nothing to do with the tokens"
    # The shape of the tokens alone says nothing of them.
    found, _, _ = rows_of(lambda s, x: s.call(torch.zeros_like, x))
    assert found == "nothing to do with the tokens"


def test_what_another_part_of_the_model_hands_on_cannot_be_told() -> None:
    """Unless the model's caller gave it."""
    small = Small()
    hidden = small.input("hidden", 2, 3, 8)
    assert token_rows(small.graph, frozenset(), frozenset()) == {hidden: None}
    assert token_rows(small.graph, frozenset(), frozenset({hidden})) == {}
    small.weight("w", 8, 8)
    small.input("mask", 2, 3, dtype=torch.int64)
    assert token_rows(small.graph, frozenset(), frozenset()) == {hidden: None}
