"""Dense linears leave padding out, as sliced ones do, where nobody reads its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparselora_fx.fx import argument, op_name, tensor
from sparselora_fx.layout import same_count
from sparselora_fx.ops import LIBRARY
from sparselora_fx.regions import Rewrite, Site
from sparselora_fx.rows import ATTENTION, NOTHING, Lists, Needs, Rows, read_rows, taken_by
from sparselora_fx.splitting import (
    filled,
    in_shape,
    logical_weight,
    sees_grid,
    shaped,
    taken_rows,
)


def skip_padding(rewrite: Rewrite) -> int:
    """Compute the frozen linears that stay dense for real tokens alone. Returns the linears
    changed.

    Before:  y: [B, L, N] = linear(x, w, b)
    After:   t: [P, K] = take_tokens(x, r);   z = linear(t, w, b)    r: the list of real tokens
             y = where(r.pos >= 0, place_tokens(z, r), z[0])
    Keeps:   the rows of real tokens, and every gradient. That no other row reaches the loss is
             proven on the graph: each reader works token by token, or is a fused attention whose
             mask is made from the batch's, a `take_tokens`, a predictor that counts tokens, or the
             loss on the batch's labels. What else the graph returns is for its caller to look at.
             `sink_takes`, run again, moves the takes past what lies between two linears.
    Skips:   graphs without a sparse region or without the loss (a block compiled by itself, a part
             before a graph break, a checkpointed body); whatever lies before a reader that may mix
             or count rows (a convolution, a recurrence, a router, attention written out or without
             a mask); token policies that do not split the tokens; what `trim_logits` has left with
             the rows of one list.
    """
    sliced = {site for region in rewrite.regions for site in region.sites}
    dense = [*rewrite.dense, *(site for site in rewrite.sites if site not in sliced)]
    found = [site for site in dense if site.unpadded and not site.node._erased]
    if not rewrite.regions or not found:
        return 0
    rows = _read_rows(rewrite, found[0])
    found = [site for site in found if _is_unread(site, rows)]
    for site in found:
        _skip(rewrite.graph, site)
    return len(found)


def _read_rows(rewrite: Rewrite, site: Site) -> Rows:
    """The nodes of which only real tokens' rows reach the loss."""
    real: Lists = tuple(site.unpadded or ())
    counted, pos = site.token_weight, real[1]
    losses = [n for n in rewrite.graph.nodes if _is_loss(n, pos)]

    def end(user: fx.Node, node: fx.Node, rows: Rows) -> Needs | None:
        x = tensor(node)
        if x is None:
            return None
        if user.op == "output":
            return NOTHING if losses and x.dim() > 0 else None
        if taken_by(user, node, rows) or _counts(user, node, counted):
            return (x.dim() - 2, real)
        if user in losses and argument(user, 0, "input") is node:
            return (0, real) if x.dim() == 2 else None
        # A row of padding may attend to padding: its own result must be unread, too.
        hides = user in rows and op_name(user) == ATTENTION and _hides_padding(user, node, pos)
        return (x.dim() - 2, real) if hides else None

    return read_rows(rewrite.graph, end)


def _is_unread(site: Site, rows: Rows) -> bool:
    """Whether the rows of padding in what a linear returns reach no loss."""
    assert site.unpadded is not None
    example = tensor(site.node)
    axis = rows[site.node][0] if site.node in rows else None
    expected = None if example is None else example.dim() - 2
    return axis is not None and axis == expected and sees_grid(site.x, site.unpadded[1])


def _counts(user: fx.Node, node: fx.Node, counted: fx.Node | None) -> bool:
    """Whether a predictor reads a node, for the tokens that count alone."""
    ours = getattr(user.target, "namespace", None) == LIBRARY.ns
    return ours and counted is not None and user.args[0] is node and counted in user.args[1:]


def _is_loss(node: fx.Node, pos: Any) -> bool:
    """Whether a node is a cross entropy with targets that are made from labels ``[B, L]``."""
    return op_name(node) == "cross_entropy" and _made_from_grid(argument(node, 1, "target"), pos)


def _hides_padding(attention: fx.Node, node: fx.Node, pos: Any) -> bool:
    """Whether a fused attention has a mask that is made from the batch's ``[B, L]``, and reads a
    node as its keys or values."""
    mask = argument(attention, 3, "attn_mask")
    if not isinstance(mask, fx.Node) or node in (mask, argument(attention, 0, "query")):
        return False
    held, keys = tensor(mask), tensor(argument(attention, 1, "key"))
    if held is None or keys is None or not same_count(held.shape[-1:], keys.shape[-2:-1]):
        return False
    return _made_from_grid(mask, pos)


def _made_from_grid(node: Any, pos: Any) -> bool:
    """Whether a value is computed from an input of whole numbers or booleans ``[B, L]``."""
    grid = tensor(pos)
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        example = tensor(current)
        if current.op == "placeholder" and example is not None and grid is not None:
            whole = not (example.dtype.is_floating_point or example.dtype.is_complex)
            shapes = zip(zip(example.shape), zip(grid.shape), strict=False)
            if whole and example.dim() == 2 and all(same_count(*pair) for pair in shapes):
                return True
        todo += current.all_input_nodes
    return False


def _skip(graph: fx.Graph, site: Site) -> None:
    assert site.unpadded is not None
    old, x = site.node, _input(site)
    with graph.inserting_before(old):
        rows = taken_rows(graph, x, site.unpadded)
        weight = logical_weight(graph, site, cast=True)
        dense = graph.call_function(torch.nn.functional.linear, (rows, weight, site.bias))
        shaped(dense, old)
        whole = filled(graph, dense, site.unpadded, like=old)
        new = in_shape(graph, whole, site.unpadded[1], like=old, sizes_of=x)
    old.replace_all_uses_with(shaped(new, old))
    graph.erase_node(old)


def _input(site: Site) -> fx.Node:
    """What the linear reads now: passes may have put another node in the place of ``site.x``."""
    sides = [n for n in site.node.all_input_nodes if n is not site.bias and not _views(n, site)]
    assert len(sides) == 1, sides
    return sides[0]


def _views(node: Any, site: Site) -> bool:
    """Whether a node is the weight, transposed or cast perhaps."""
    while isinstance(node, fx.Node) and node is not site.weight:
        node = node.args[0] if node.args else None
    return node is site.weight
