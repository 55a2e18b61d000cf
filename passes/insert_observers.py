"""While a plan calibrates online, take a few rows of what each marked frozen weight reads."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.analysis.linears import stored_kn
from sparselora_fx.analysis.regions import Observed
from sparselora_fx.estimator.sample_rows import SPAN
from sparselora_fx.graph.nodes import tensor
from sparselora_fx.ir.ops import OPS, agree
from sparselora_fx.rewrite.rewrite import Rewrite

_Rows = tuple[fx.Node, fx.Node | None]


def insert_observers(rewrite: Rewrite) -> int:
    """Turn `observed` markers into rows that the graph returns, one set for each input. Returns
    the inputs observed.

    Before:  m = observed(x, wq, picked);  q = linear(m, wq);  n = observed(x, wk, picked);  ...
    After:   rows: [n, K] = x.detach().flatten(0, -2)[idx]       picked = [places, counted, idx]
             q = linear(x, wq);  k = linear(x, wk);  ...
             where x has not one row for each token of the batch (T rows, or no token grid at all):
             taken: i64[n] = places * T // span;  rows = pad(x.detach().flatten(0, -2))[taken]
    Keeps:   every existing value. What is inserted needs no gradient and writes nothing, so a
             backward that recomputes a block observes nothing twice.
    Skips:   a weight that is computed in the graph.  Source: none, this is ours.
    """
    graph = rewrite.graph
    readers: dict[fx.Node, list[fx.Node]] = {}
    found: dict[fx.Node, _Rows] = {}
    for mark in list(graph.nodes):
        if mark.target not in (OPS.observed, OPS.observed.default):
            continue
        x, weight, picked = mark.args
        value = tensor(x)
        if weight.op == "placeholder" and value is not None and value.dim() >= 2:
            readers.setdefault(x, []).append(weight)
            if x not in found:
                with graph.inserting_before(mark):
                    found[x] = _rows(graph, x, picked)
        mark.replace_all_uses_with(x)
        graph.erase_node(mark)
    for x, weights in readers.items():
        stored = tuple(stored_kn(weight) for weight in weights)
        rewrite.observed.append(Observed(tuple(weights), stored, *found[x]))
    return len(readers)


def _rows(graph: fx.Graph, x: fx.Node, picked: list[fx.Node]) -> _Rows:
    """The rows, and their indices where the graph has to work them out."""
    detached = graph.call_method("detach", (x,))
    rows = graph.call_method("flatten", (detached, 0, -2))
    places, *grid = picked
    value, counted = tensor(x), tensor(grid[0]) if grid else None
    assert value is not None
    if counted is not None and agree(value, counted):
        return graph.call_method("index_select", (rows, 0, grid[1])), None
    size = graph.call_method("size", (rows, 0))
    rows = graph.call_function(torch.nn.functional.pad, (rows, (0, 0, 0, 1)))  # for an empty input
    scaled = graph.call_method("mul", (places, size))
    taken = graph.call_method("floor_divide", (scaled, SPAN))
    return graph.call_method("index_select", (rows, 0, taken)), taken
