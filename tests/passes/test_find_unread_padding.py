"""Which rows of padding reach no loss, in a graph that stays as it is."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx.passes.find_unread_padding import find_unread_padding
from sparselora_fx.rewrite.rewrite import Options, Program, TracedCall
from tests.support.ffn_example import text_of
from tests.support.small_graphs import Small


def traced(end: str = "loss", *, broken: bool = False, lists: int = 4) -> Program:
    """A marked linear, neighbouring tokens mixed behind it if asked for, and a loss on its rows."""
    small = Small()
    x, labels = small.input("x", 2, 3, 8), small.input("labels", 2, 3, dtype=torch.int64)
    tokens: tuple[fx.Node, ...] = (small.input("counted", 2, 3, dtype=torch.bool),)
    for name in "corn"[:lists]:
        tokens += small.lists(name, 16, 2, 3)
    y = small.site(x, "w", 5, tokens=tokens)
    if end == "mixed":
        y = small.call(torch.add, y, small.call("roll", y, 1, 1))
    shifted = small.call(F.pad, labels, (0, 1), value=-100)
    target = small.call(operator.getitem, shifted, (Ellipsis, slice(1, None)))
    flat = small.call("reshape", target, -1)
    loss = small.call(F.cross_entropy, small.call("view", y, -1, 5), flat)
    small.graph.output((loss, y) if end == "logits" else (loss,))
    small.gm.compile_subgraph_reason = SimpleNamespace(graph_break=broken)  # type: ignore[assignment]
    values = {n.name: torch.zeros(tuple(n.meta["example_value"].shape),
                                  dtype=n.meta["example_value"].dtype)
              for n in small.graph.find_nodes(op="placeholder")}  # fmt: skip
    call = TracedCall({"labels": values["labels"]})
    return Program(small.gm, list(values.values()), Options(), call)


def found(program: Program) -> set[str]:
    before = text_of(program.gm.graph)
    count = find_unread_padding(program)
    assert count == len(program.padding_unread)
    assert text_of(program.gm.graph) == before
    again = program.padding_unread
    assert find_unread_padding(program) == count and program.padding_unread == again
    return {node.name for node in program.padding_unread}


@pytest.mark.parametrize("end", ["loss", "logits"])
def test_a_linear_before_a_loss(end: str) -> None:
    """Labels ignore padding, and of rows that are returned beside a loss real ones are looked
    at."""
    assert {"linear", "site_default", "x"} <= found(traced(end))


@pytest.mark.parametrize(
    "options",
    [{"end": "mixed"}, {"broken": True, "end": "logits"}, {"lists": 2}],
    ids=["neighbours are mixed", "a graph break", "no list of real tokens"],
)
def test_what_is_not_proven(options: Any) -> None:
    assert not {"linear", "site_default", "x"} & found(traced(**options))


def test_labels_of_another_call_are_no_labels() -> None:
    program = traced()
    other = TracedCall({"labels": torch.zeros(2, 3, dtype=torch.int64)})
    assert not {"linear", "site_default", "x"} & found(
        Program(program.gm, program.inputs, program.options, other)
    )
