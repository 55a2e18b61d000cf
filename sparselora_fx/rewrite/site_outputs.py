"""What a site's output is before anybody reads it: biases, LoRA branches, a scale of its rows."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument

from sparselora_fx.analysis.branches import LINEAR_CASTS, adapter_branch, reads
from sparselora_fx.analysis.linears import linear_uses, products
from sparselora_fx.analysis.regions import Site, is_trainable
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.rewrite.respell import as_addition, called

_ADDITIONS = ("add", "__add__", "__radd__")
_VIEWS = {*LINEAR_CASTS, "view", "reshape", "flatten", "unflatten"}
_PRODUCTS = ("mul", "__mul__", "__rmul__")
_MAX_SCALE = 32  # nodes between a weight's norms and the scale; a handful

Scale = fx.Node | None  # [N], what the rows of a site are scaled by; None: one


def complete_site(site: Site, frozen: frozenset[fx.Node]) -> None:
    """Follow a site's products through views and casts to the additions of bias and LoRA branches,
    and through what scales its rows with norms of its weight (DoRA). Nothing that reads another
    frozen weight is a branch. Where rows are scaled, so are those of its factors.

    LoRA:  z = y + branch                                   y: the site's product, perhaps + bias
    DoRA:  z = y + ((s - 1) * y2 + s * branch)              s: m / ||W + BA|| by row; y2: y, y less
                                                            its bias, or a product with dropout(x)
    """
    held: dict[fx.Node, Scale] = dict.fromkeys([site.node, *site.more])
    made = _made_of_rows(site)
    todo = list(held)
    while todo:
        node = todo.pop(0)
        while as_addition(node) is not None:
            pass
        if len(node.users) > 1 and not made:
            continue
        for user in list(node.users):
            if user not in held and _continues(user, site, held, made, frozen):
                todo.append(user)
    last = next(reversed(held))
    if held[last] is not None:
        _scale_factors(site, held[last], last)


def _continues(
    user: fx.Node,
    site: Site,
    held: dict[fx.Node, Scale],
    made: set[fx.Node],
    frozen: frozenset[fx.Node],
) -> bool:
    """Whether a reader of a site's output is a part of it; then it is among those held."""
    name = op_name(user)
    if name in _VIEWS:
        source = next((node for node in held if node is user.args[0]), None)
        if source is not None:
            held[user] = held[source]
        return source is not None
    if len(user.args) != 2 or user.kwargs:
        return False
    one, other = user.args if user.args[0] in held else reversed(user.args)
    if name in _ADDITIONS:
        return _adds(user, one, other, site, held, frozen)
    if name == "sub" and user.args[0] is one and _is_bias(other, site) and made:
        held[user] = held[one]  # type: ignore[index]
        site.scaling.add(user)
        return True
    if name in _PRODUCTS and _is_scale(other, site, made):
        held[user] = _product(user, held[one], other)  # type: ignore[index]
        site.scaling.add(user)
        return True
    return False


def _adds(
    user: fx.Node,
    one: Argument,
    other: Argument,
    site: Site,
    held: dict[fx.Node, Scale],
    frozen: frozenset[fx.Node],
) -> bool:
    assert isinstance(one, fx.Node)
    if _is_bias(other, site):
        site.bias_adds.add(user)
        held[user] = held[one]
        return True
    if not isinstance(other, fx.Node):
        return False
    if other in held:
        held[user] = _sum(user, held[one], held[other])
        site.scaling.add(user)
        return True
    branch = adapter_branch(other, site.x)
    if branch is None or reads(branch, frozen) or reads(branch, set(held)):
        return False
    site.adapter_adds[user] = other
    site.adapter_nodes |= branch
    read = {n for inner in branch for n in inner.all_input_nodes}
    site.adapter_weights |= {n for n in read if is_trainable(n)}
    held[user] = held[one]
    return True


def _is_bias(node: object, site: Site) -> bool:
    example = tensor(node)
    given = isinstance(node, fx.Node) and node.op == "placeholder"
    return given and example is not None and same_shape(example.shape, (site.out_features,))


def _made_of_rows(site: Site) -> set[fx.Node]:
    """What is computed from a site's weight besides its products (`linears.products`)."""
    own = {use[0] for use in products(site.weight)}
    todo = [node for node, *_ in linear_uses(site.weight) if node not in own]
    made: set[fx.Node] = set()
    while todo and len(made) < _MAX_SCALE:
        node = todo.pop(0)
        example = tensor(node)
        matrix = example is not None and example.dim() <= 2
        if node not in made and matrix and not own.intersection(node.all_input_nodes):
            made.add(node)
            todo += node.users
    return made


def _is_scale(node: object, site: Site, made: set[fx.Node]) -> bool:
    """Whether a value is made of a weight's norms, and is one number for each of its rows."""
    example = tensor(node)
    if not isinstance(node, fx.Node) or node not in made or example is None:
        return False
    return same_shape(example.shape, (*[1] * (example.dim() - 1), site.out_features))


def _product(user: fx.Node, scale: Scale, other: Argument) -> fx.Node:
    with user.graph.inserting_before(user):
        row = called("reshape", called("detach", other), -1)
        return row if scale is None else called(torch.mul, scale, row)


def _sum(user: fx.Node, one: Scale, other: Scale) -> Scale:
    with user.graph.inserting_before(user):
        if one is not None and other is not None:
            return called(torch.add, one, other)
        scale = other if one is None else one
        return None if scale is None else called(torch.add, scale, 1)


def _scale_factors(site: Site, scale: Scale, last: fx.Node) -> None:
    """``diag(s) W ~= (diag(s) a) b``: the choice of channels sees what the model sees."""
    a, b = site.factors
    factor = tensor(a)
    if factor is None or not same_shape(factor.shape[:1], (site.out_features,)):
        return  # an estimator that does not know this site
    with last.graph.inserting_before(last):
        column = called("to", called("unsqueeze", scale, -1), factor.dtype)
        site.factors = (called(torch.mul, a, column), b)
