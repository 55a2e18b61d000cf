"""Context and output tokens of a tensor apart, and in place again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import SymInt, fx

from sparselora_fx.analysis.regions import FOREIGN, IN_ORDER, MOVED, SWAPPED, Site
from sparselora_fx.graph.layout import same_count
from sparselora_fx.graph.nodes import before_flattening, tensor
from sparselora_fx.ir.markers import TokenList
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.gather_motion import token_gather_of

Split = tuple[TokenList[fx.Node], TokenList[fx.Node]]  # of context tokens, and of output tokens


def gathered(graph: fx.Graph, x: fx.Node, split: Split) -> list[fx.Node]:
    """The rows of x for context tokens, and those for output tokens."""
    return [token_gather_of(graph, x, part) for part in split]


def logical_weight(graph: fx.Graph, site: Site, cast: torch.dtype | None = None) -> fx.Node:
    """A site's weight as ``[N, K]``, in another dtype if given."""
    weight = graph.call_function(torch.t, (site.weight,)) if site.transposed else site.weight
    return graph.call_method("to", (weight, cast)) if cast else weight


def cast_of(site: Site, node: fx.Node, x: fx.Node) -> torch.dtype | None:
    """The dtype that the model itself casts the weight to before one of its products, or None."""
    read, weight = x.meta["example_value"], site.weight.meta["example_value"]
    viewed = site.weight not in node.all_input_nodes
    return read.dtype if viewed and read.dtype != weight.dtype else None


def merged(
    graph: fx.Graph, y: fx.Node, z: fx.Node, split: Split, *, like: fx.Node, sizes_of: fx.Node
) -> fx.Node:
    """Rows y of context tokens and z of output tokens in place again, in the shape of ``like``.
    Where token dimensions are not the batch's own, they are those of ``sizes_of``."""
    context, output = split
    whole = graph.call_function(OPS.scatter_two_lists.default, (y, z, *context, *output))
    return in_shape(graph, whole, context.pos, like=like, sizes_of=sizes_of)


def filled(graph: fx.Graph, y: fx.Node, tokens: TokenList[fx.Node]) -> fx.Node:
    """Rows y of one list ``[idx, pos]`` in place again, as ``[B, L, N]``; elsewhere y's first row,
    without a gradient. For where nobody reads those: a row of zeros might have a norm without a
    derivative."""
    scattered = graph.call_function(OPS.scatter_tokens.default, (y, *tokens))
    held = graph.call_method("unsqueeze", (graph.call_function(torch.ge, (tokens.pos, 0)), -1))
    filler = graph.call_method("detach", (graph.call_method("narrow", (y, 0, 0, 1)),))
    return graph.call_function(torch.where, (held, scattered, filler))


def in_shape(
    graph: fx.Graph, whole: fx.Node, grid_node: object, *, like: fx.Node, sizes_of: fx.Node
) -> fx.Node:
    """``whole[B, L, N]`` in the shape of ``like``, as `merged` says."""
    shape, grid = tensor(like), tensor(grid_node)
    assert shape is not None and grid is not None
    if shape.dim() == 2:  # a linear on flattened tokens
        return graph.call_method("flatten", (whole, 0, -2))
    if shape.dim() != 3 or not all(map(same_count, zip(shape.shape[:-1]), zip(grid.shape))):
        sizes = [graph.call_method("size", (sizes_of, i)) for i in range(shape.dim() - 1)]
        return graph.call_method("reshape", (whole, *sizes, shape.shape[-1]))
    return whole


def _before_rows(x: fx.Node) -> fx.Node:
    """What the rows of x were before they were flattened, as far back as can be told: x itself, or
    a value that x is made of row by row."""
    node = before_flattening(x)
    while (example := tensor(node)) is not None and example.dim() == 2:
        rows = example.shape[:1]
        inputs = ((n, tensor(n)) for n in node.all_input_nodes)
        alike = (
            n for n, t in inputs if t is not None and t.dim() == 2 and same_count(t.shape[:1], rows)
        )
        source = next(alike, None)
        if source is None:
            break
        node = before_flattening(source)
    return node


def sees_grid(site: Site, pos: fx.Node) -> bool:
    """Whether the rows that a site reads are the batch's tokens ``[B, L]``, in their order.

    Where a batch has as many samples as tokens, shapes do not tell the order: the way back to the
    batch must.
    """
    held, grid = tensor(_before_rows(site.x)), tensor(pos)
    assert held is not None and grid is not None
    lead = [size for size in held.shape[:-1] if not same_count((size,), ())]
    tokens = [size for size in grid.shape if not same_count((size,), ())]
    if len(tokens) == 2 and site.order != IN_ORDER:
        square = same_count(tokens[:1], tokens[1:]) or len(lead) == 1
        if site.order == SWAPPED or square:
            return False
    ordered = len(lead) == len(tokens) and all(map(_as_many, zip(lead), zip(tokens)))
    return site.order not in (MOVED, FOREIGN) and (
        ordered or (len(lead) == 1 and _as_many(lead, tokens))
    )


def _as_many(rows: Sequence[int | SymInt], tokens: Sequence[int | SymInt]) -> bool:
    """Whether rows are as many as tokens. Rows whose number is fixed fix that of the tokens, too:
    the grid's sizes are symbols from the first call on (`step_tokens`), the batch's only when they
    have varied."""
    held = math.prod(rows)
    if isinstance(held, int):
        return bool(math.prod(tokens) == held)
    return same_count(rows, tokens)
