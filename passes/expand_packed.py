"""Spell products with quantised weights as linears on a matrix that stands for them."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.graph.emit import set_value, watch
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL
from sparselora_fx.rewrite.rewrite import Program


def expand_packed(program: Program) -> int:
    """Let a linear read what a quantised weight unpacks to, so that every other pass sees a plain
    weight. Returns the products changed.

    Before:  y: [T, N] = packed_linear(x, packed, held, layout, None, ALL)
    After:   w: [N, K] = unpack(packed, held, layout, x.dtype);  y: [T, N] = linear(x, w)
    Keeps:   every value; `slice_packed` turns each product back, before anything is unpacked.
    """
    changed = 0
    for gm in program.gm.modules():
        if isinstance(gm, fx.GraphModule):
            watch(gm)
            for node in [n for n in gm.graph.nodes if op_name(n) == "packed_linear"]:
                changed += _expand(gm.graph, node)
    return changed


def _expand(graph: fx.Graph, node: fx.Node) -> int:
    x, packed, held, layout, idx, of = node.args
    read = tensor(x)
    assert read is not None and idx is None and of == ALL, "hooks mark whole products only"
    with graph.inserting_before(node):
        weight = graph.call_function(OPS.unpack.default, (packed, held, layout, read.dtype))
        product = graph.call_function(torch.nn.functional.linear, (x, weight))
    set_value(product, node.meta["example_value"])  # whatever autocast would make of a linear
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return 1
