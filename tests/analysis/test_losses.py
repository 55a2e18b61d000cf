"""Cross entropies on the batch's labels, in both conventions."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.analysis.losses import ignores_unlabelled, labels_of, shown_conventions
from tests.support.small_graphs import Small

Build = Callable[[Small, fx.Node], fx.Node]
NEXT = (Ellipsis, slice(1, None))


def padded(
    small: Small, labels: fx.Node, value: float = -100, by: tuple[int, int] = (0, 1)
) -> fx.Node:
    return small.call(F.pad, labels, by, value=value)


def cut(small: Small, labels: fx.Node) -> fx.Node:
    return small.call(operator.getitem, labels, NEXT)


TARGETS: dict[str, tuple[Build, tuple[bool, bool]]] = {
    "as they are": (lambda s, y: s.call("view", y, -1), (False, True)),
    "cast": (lambda s, y: s.call("to", s.call("flatten", y), torch.int32), (False, True)),
    "shifted": (lambda s, y: s.call("reshape", cut(s, padded(s, y)), -1), (True, True)),
    "cut": (lambda s, y: s.call("reshape", cut(s, y), -1), (True, False)),
}
OTHERS: dict[str, Build] = {
    "filled with a label": lambda s, y: s.call("reshape", cut(s, padded(s, y, 0)), -1),
    "padded in front": lambda s, y: s.call("reshape", cut(s, padded(s, y, -100, (1, 0))), -1),
    "from the third": lambda s, y: s.call(
        "reshape", s.call(operator.getitem, y, (Ellipsis, slice(2, None))), -1
    ),
    "not flat": lambda s, y: y,
    "probabilities": lambda s, y: s.call("view", s.input("p", 2, 4), -1),
}


@pytest.mark.parametrize("name", TARGETS)
def test_labels_of(name: str) -> None:
    small = Small()
    labels = small.input("labels", 2, 4, dtype=torch.int64)
    build, said = TARGETS[name]
    assert labels_of(build(small, labels)) == (labels, *said)


@pytest.mark.parametrize("name", OTHERS)
def test_what_are_no_labels(name: str) -> None:
    small = Small()
    assert labels_of(OTHERS[name](small, small.input("labels", 2, 4, dtype=torch.int64))) is None


def test_labels_that_are_written_into_are_the_graph_s_own() -> None:
    small = Small()
    labels = small.input("labels", 2, 4, dtype=torch.int64)
    target = small.call("view", small.call("clone", labels), -1)
    assert labels_of(target) is not None
    small.call("fill_", target, 1)
    assert labels_of(target) is None


def loss(small: Small, target: fx.Node, **options: int) -> fx.Node:
    return small.call(F.cross_entropy, small.input("z", 8, 6), target, **options)


def test_ignored_labels() -> None:
    small = Small()
    target = small.call("view", small.input("labels", 2, 4, dtype=torch.int64), -1)
    assert ignores_unlabelled(loss(small, target))
    assert ignores_unlabelled(loss(small, target, ignore_index=-100))
    assert not ignores_unlabelled(loss(small, target, ignore_index=0))
    assert not ignores_unlabelled(target)


@pytest.mark.parametrize(
    ("inputs", "conventions"),
    [
        (["labels"], {True}),
        (["L_kwargs_labels_"], {True}),
        (["shift_labels"], set()),
        (["targets"], set()),
        ([], set()),
    ],
)
def test_conventions_of_a_graph(inputs: list[str], conventions: set[bool]) -> None:
    small = Small()
    for name in inputs:
        labels = small.input(name, 2, 4, dtype=torch.int64)
        loss(small, small.call("reshape", cut(small, padded(small, labels)), -1))
    assert shown_conventions(small.graph) == conventions


def test_a_graph_may_show_both() -> None:
    small = Small()
    labels = small.input("labels", 2, 4, dtype=torch.int64)
    loss(small, small.call("view", labels, -1))
    loss(small, small.call("reshape", cut(small, padded(small, labels)), -1))
    assert shown_conventions(small.graph) == {True, False}
