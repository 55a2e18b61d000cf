"""One batched matmul for LoRA up-projections of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import getitem
from typing import NamedTuple

import torch
from torch import fx

from sparselora_fx import environment
from sparselora_fx.analysis.lora import adapter_weights, is_up_projection
from sparselora_fx.graph.nodes import argument, changes_input, op_name, operand, tensor
from sparselora_fx.rewrite.joining import alike
from sparselora_fx.rewrite.respell import drop
from sparselora_fx.rewrite.rewrite import Rewrite


def batch_adapters(rewrite: Rewrite) -> int:
    """Batch the up-projections whose down-projections `join_adapters` has joined, on a GPU. Returns
    the linears batched.

    Before:  p: [T, r] = narrow(y: [T, 2r], -1, 0, r);  q = narrow(y, -1, r, r)
             u: [T, N] = linear(p, Bk: [N, r]);  v: [T, N] = linear(q, Bv)
    After:   u, v = bmm(unflatten(y, 1, [2, r]).transpose(0, 1), stack(Bk, Bv).transpose(1, 2))
    Keeps:   every value and gradient, up to the rounding of another kernel. Their gradients, by
             input and by matrix, are batched matmuls too: three launches where there were six.
    Skips:   up-projections of other shapes; inputs that do not lie side by side; results that are
             written to; graphs that keep some gradient from flowing back; CPUs, where a batch of
             two takes 1.2 to 1.9 times as long as `orient_adapters`' form (torch 2.13, MKL, one
             thread, fp32).
    Source:  horizontal fusion of matmuls, as in Inductor's batch fusion of linears.
    """
    if rewrite.cuts_gradients or not rewrite.regions:
        return 0
    weights = adapter_weights(rewrite.sites)
    parts = {
        node: part
        for node in rewrite.graph.nodes
        if is_up_projection(node, weights) and _may_be_batched(node) and (part := _part(node))
    }

    def key(node: fx.Node) -> tuple[fx.Node, int, torch.Size]:
        return parts[node].source, parts[node].width, _weight(node).shape

    groups = alike(rewrite.graph, parts.__contains__, key)
    runs = [run for group in groups for run in _side_by_side(group, parts) if len(run) > 1]
    for run in runs:
        _batch(rewrite.graph, run, parts[run[0]])
    return sum(map(len, runs))


class _Part(NamedTuple):
    """Some columns of a value."""

    source: fx.Node
    start: int
    width: int


def _part(node: fx.Node) -> _Part | None:
    """What an up-projection reads, if it is a part of another value."""
    x = argument(node, 0, "input")
    if op_name(x) != "narrow" or argument(x, 1, "dim") != -1:
        return None
    return _Part(operand(x), argument(x, 2, "start"), argument(x, 3, "length"))


def _weight(node: fx.Node) -> torch.Tensor:
    weight = tensor(argument(node, 1, "weight"))
    assert weight is not None
    return weight


def _may_be_batched(node: fx.Node) -> bool:
    """Where launches are to be few. Autograd refuses to let one of several views be written to."""
    written = any(changes_input(user) for user in node.users)
    return environment.shares_launches(_weight(node).device.type) and not written


def _side_by_side(group: list[fx.Node], parts: Mapping[fx.Node, _Part]) -> Iterator[list[fx.Node]]:
    """Those whose inputs follow one another, in the order of their inputs."""
    run: list[fx.Node] = []
    for node in sorted(group, key=lambda node: parts[node].start):
        if run and parts[node].start != parts[run[-1]].start + parts[node].width:
            yield run
            run = []
        run.append(node)
    yield run


def _batch(graph: fx.Graph, run: list[fx.Node], first: _Part) -> None:
    source, start, width = first
    count, value = len(run), tensor(source)
    assert value is not None
    with graph.inserting_before(next(node for node in graph.nodes if node in run)):
        inputs = graph.call_function(torch.narrow, (source, -1, start, count * width))
        if value.dim() != 2:
            inputs = graph.call_method("flatten", (inputs, 0, -2))
        inputs = graph.call_method("unflatten", (inputs, -1, (count, width)))
        inputs = graph.call_method("transpose", (inputs, 0, 1))
        stacked = graph.call_function(torch.stack, ([argument(n, 1, "weight") for n in run],))
        matrices = graph.call_method("transpose", (stacked, 1, 2))
        results = graph.call_method("unbind", (graph.call_function(torch.bmm, (inputs, matrices)),))
        rows = range(value.dim() - 1 if value.dim() != 2 else 0)
        sizes = [graph.call_method("size", (source, i)) for i in rows]
        for i, node in enumerate(run):
            result = graph.call_function(getitem, (results, i))
            if sizes:
                result = graph.call_method("view", (result, *sizes, _weight(node).shape[0]))
            node.replace_all_uses_with(result)
    for node in run:
        drop(node)
