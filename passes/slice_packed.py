"""Unpack of quantised weights only what is multiplied."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from sparselora_fx.graph.nodes import argument, op_name
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL, COLUMNS, ROWS
from sparselora_fx.rewrite.packed import stored
from sparselora_fx.rewrite.rewrite import Rewrite

_PRODUCTS = {"linear": ALL, "sliced_linear": ROWS, "sliced_linear_in": COLUMNS}


def slice_packed(rewrite: Rewrite) -> int:
    """Turn products with what a quantised weight unpacks to into products with the packed weight,
    which unpack the rows or columns that they read, in the forward and again in the backward.
    Returns the products changed.

    Before:  w: [N, K] = unpack(packed, held, layout, dtype)
             y: [T, k] = sliced_linear(x, w, s);   o: [U, N] = linear(z, w)
             d: [T, N] = sliced_linear_in(h, w, s)
    After:   y: [T, k] = packed_linear(x, packed, held, layout, s, ROWS)
             o: [U, N] = packed_linear(z, packed, held, layout, None, ALL)
             d: [T, N] = packed_linear(h, packed, held, layout, s, COLUMNS)
    Keeps:   every value and gradient: both unpack to the dtype of what is multiplied.
    Skips:   a matrix that anything else reads, which is unpacked whole.
    Must be the last pass that looks at products: none knows those it makes.
    """
    changed = 0
    matrices = rewrite.graph.find_nodes(op="call_function", target=OPS.unpack.default)
    for site in (*rewrite.sites, *rewrite.dense):
        site.weight = stored(site.weight)
    rewrite.skips = [replace(skip, weight=stored(skip.weight)) for skip in rewrite.skips]
    for matrix in matrices:
        for user in list(matrix.users):
            changed += _turn(rewrite.graph, user, matrix)
        if not matrix.users:
            rewrite.graph.erase_node(matrix)
    return changed


def _turn(graph: fx.Graph, product: fx.Node, matrix: fx.Node) -> int:
    name = op_name(product)
    if name not in _PRODUCTS or argument(product, 1, "weight") is not matrix:
        return 0
    packed, held, layout, _ = matrix.args
    idx = None if name == "linear" else product.args[2]
    bias = argument(product, 2, "bias") if name == "linear" else None
    with graph.inserting_before(product):
        arguments = (argument(product, 0, "input"), packed, held, layout, idx, _PRODUCTS[name])
        new = graph.call_function(OPS.packed_linear.default, arguments)
        if bias is not None:
            new = graph.call_function(torch.add, (new, bias))
    product.replace_all_uses_with(new)
    graph.erase_node(product)
    return 1
