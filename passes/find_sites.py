"""Find the frozen linears that were marked, with their LoRA branches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from sparselora_fx.analysis.linears import linear_parts, linear_uses
from sparselora_fx.analysis.regions import UNKNOWN, Site, Skip, is_trainable
from sparselora_fx.graph.emit import set_value
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.ir.markers import DENSE, WITHOUT_GRADIENTS, SiteSpec
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.score_ops import ACROSS
from sparselora_fx.rewrite.respell import as_addition
from sparselora_fx.rewrite.rewrite import Rewrite

_CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "detach"}
_MAX_BRANCH = 64  # nodes; a LoRA branch is a handful


def find_sites(rewrite: Rewrite) -> int:
    """Turn every site marker into a `Site`, and take the markers out of the graph. Returns the
    sites found.

    Before:  m = site(x, w, a, b, mask, spec);  y = linear(m, w, bias);  l = linear(linear(x, A),
             B);  z = y + l
    After:   y = linear(x, w, bias);            l = linear(linear(x, A), B);  z = y + l       and
             Site(y, x, w, ..., z)
    Keeps:   every value bit for bit; where a branch is added in another spelling (``y += l``,
             ``addmm(y, h, B)``: `spellings`) up to the rounding of its scale.
    Skips:   a weight that is used twice, not as a linear, or that trains.
    """
    marks = [n for n in rewrite.graph.nodes if n.target is OPS.site.default or n.target is OPS.site]
    by_weight: dict[fx.Node, list[fx.Node]] = {}
    for mark in marks:
        by_weight.setdefault(mark.args[1], []).append(mark)
    carried = {weight: group[0].args for weight, group in by_weight.items()}
    orders = {weight: rewrite.orders[group[0]] for weight, group in by_weight.items()
              if group[0] in rewrite.orders}  # fmt: skip
    for mark in marks:
        mark.replace_all_uses_with(mark.args[0])
        rewrite.graph.erase_node(mark)
    for weight, args in carried.items():
        if weight.op != "placeholder":
            continue  # computed in the graph (a parametrization): no frozen weight any more
        found = _site(weight, args, len(by_weight[weight]))
        if isinstance(found, Site):
            found.padding_unread = found.node in rewrite.padding_unread
            found.order = orders.get(weight, UNKNOWN)
        if args[5] == DENSE:
            rewrite.dense += [] if isinstance(found, Skip) else [found]
        elif isinstance(found, Skip):
            rewrite.skips.append(found)
        else:
            rewrite.sites.append(found)
    for site in rewrite.sites:
        _turn_factors(site)
        _cast_factors(site)
        _find_adapter(site, rewrite.frozen - {site.weight})
    return len(rewrite.sites)


def _site(weight: fx.Node, args: tuple, calls: int) -> Site | Skip:  # type: ignore[type-arg]
    uses = linear_uses(weight)
    if is_trainable(weight):
        return Skip(weight, "the weight trains")
    if args[5] == WITHOUT_GRADIENTS:
        return Skip(
            weight,
            "it runs without gradients inside a training step (a reversible layer, say): a "
            "backward that runs it again would not be sliced",
        )
    if calls > 1 or len(uses) > 1:
        return Skip(
            weight,
            "the weight is used more than once in this graph, and its uses would have to share one "
            "choice of channels (a block that is applied several times gets one for each use where "
            "it is checkpointed)",
        )
    if not uses:
        return Skip(weight, "the weight is not used by a linear that is recognised")
    node, view, transposed = uses[0]
    parts = linear_parts(node, view)
    shape, out = tensor(weight), tensor(node)
    if parts is None or shape is None or out is None or shape.dim() != 2:
        what = f"{op_name(node)} with this weight"
        return Skip(weight, f"{what} is not a linear over the last dimension")
    x, bias, stored_as_kn = parts
    transposed = transposed != stored_as_kn
    n, k = (int(s) for s in (reversed(shape.shape) if transposed else shape.shape))
    x_value = tensor(x)
    if x_value is None or not _ends_with(x_value, k) or not _ends_with(out, n) or n == k == 0:
        return Skip(weight, "the linear does not act on the last dimension of its input")
    if x_value.dim() < 2:
        why = "its input is a single vector: there are no tokens to score channels by"
        return Skip(weight, why)
    spec = SiteSpec.decode(args[5])
    statistics = dict(zip(spec.statistics, (args[6] or ()) if len(args) > 6 else (), strict=True))
    factors = (args[2], args[3])
    return Site(
        node,
        x,
        weight,
        transposed,
        bias,
        factors,
        tuple(args[4]),
        spec,
        n,
        k,
        statistics=statistics,
    )


def _turn_factors(site: Site) -> None:
    """Where the graph uses a weight the other way round than its factors take it to be stored,
    theirs are those of the transpose: ``W ~= a b``, so ``W^T ~= b^T a^T``."""
    if site.transposed == site.spec.kn:
        return
    a, b = site.factors
    site.factors = (_at_start(b, "t"), _at_start(a, "t"))
    if ACROSS in site.statistics:
        site.statistics["norms"] = site.statistics[ACROSS]


def _cast_factors(site: Site) -> None:
    """Where the model casts a weight before it multiplies, its factors are cast alike."""
    if site.cast is not None:
        a, b = site.factors
        site.factors = (_at_start(a, "to", site.cast), _at_start(b, "to", site.cast))


def _at_start(factor: fx.Node, method: str, *args: Any) -> fx.Node:
    """A method of a factor, called before all else."""
    graph = factor.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        new = graph.call_method(method, (factor, *args))
    set_value(new, getattr(factor.meta["example_value"], method)(*args))
    return new


def _find_adapter(site: Site, frozen: frozenset[fx.Node]) -> None:
    """Follow a site's output through views and casts to the additions of bias and LoRA branches.
    Nothing that reads another frozen weight is one."""
    node = site.node
    while as_addition(node) or len(node.users) == 1:
        user = next(iter(node.users))
        name = op_name(user)
        if name in ("add", "__add__", "__radd__") and len(user.args) == 2 and not user.kwargs:
            other: Any = user.args[1] if user.args[0] is node else user.args[0]
            if _is_bias(other, site):
                site.bias_adds.add(user)
            else:
                branch = adapter_branch(other, site.x) if isinstance(other, fx.Node) else None
                if branch is None or _reads(branch, frozen):
                    break
                site.adapter_adds[user] = other
                site.adapter_nodes |= branch
                read = {n for inner in branch for n in inner.all_input_nodes}
                site.adapter_weights |= {n for n in read if is_trainable(n)}
        elif name not in _CASTS and name not in ("view", "reshape", "flatten", "unflatten"):
            break
        node = user


def _ends_with(value: Tensor, channels: int) -> bool:
    return same_shape(value.shape[-1:], (channels,))


def _reads(branch: set[fx.Node], weights: frozenset[fx.Node]) -> bool:
    return any(source in weights for node in branch for source in node.all_input_nodes)


def _is_bias(node: Any, site: Site) -> bool:
    example = tensor(node)
    held = isinstance(node, fx.Node) and node.op == "placeholder"
    return held and example is not None and same_shape(example.shape, (site.out_features,))


def adapter_branch(node: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The nodes of an expression that is computed from x and small weights alone (a LoRA branch),
    or None.

    Recognises any spelling (modules, `F.linear`, `@`, einsum, scaling, dropout, casts): the leaves
    decide, not the shape.
    """
    branch: set[fx.Node] = set()
    todo, reads_x, has_weight = [node], False, False
    sources = _before_views(x)
    while todo:
        current = todo.pop()
        if current in sources:
            reads_x = True
        elif current.op == "placeholder":
            example = tensor(current)
            has_weight |= example is not None and example.dim() >= 2 and is_trainable(current)
        elif current not in branch:
            branch.add(current)
            if len(branch) > _MAX_BRANCH:
                return None
            todo += current.all_input_nodes
    return branch if reads_x and has_weight else None


def _before_views(x: fx.Node) -> set[fx.Node]:
    """x, and what it was before views and casts (a Conv1D flattens its input; its LoRA branch
    reads the unflattened one)."""
    nodes = {x}
    while op_name(x) in (*_CASTS, "view", "reshape", "flatten") and isinstance(x.args[0], fx.Node):
        x = x.args[0]
        nodes.add(x)
    return nodes
