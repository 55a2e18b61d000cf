"""Find the frozen linears that were marked, with their LoRA branches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from sparselora_fx.analysis.branches import LINEAR_CASTS
from sparselora_fx.analysis.linears import linear_parts, products
from sparselora_fx.analysis.reasons import WITHOUT
from sparselora_fx.analysis.regions import UNKNOWN, Site, Skip, is_trainable
from sparselora_fx.graph.layout import same_shape
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.ir.markers import DENSE, WITHOUT_GRADIENTS, SiteSpec
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.score_ops import ACROSS
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.site_outputs import complete_site
from sparselora_fx.rewrite.token_split import cast_of


def find_sites(rewrite: Rewrite) -> int:
    """Turn every site marker into a `Site`, and take the markers out of the graph. Returns the
    sites found.

    Before:  m = site(x, w, a, b, mask, spec);  y = linear(m, w, bias);  l = linear(linear(x, A),
             B);  z = y + l
    After:   y = linear(x, w, bias);            l = linear(linear(x, A), B);  z = y + l       and
             Site(y, x, w, ..., z)
    Keeps:   every value bit for bit; where a branch is added in another spelling (``y += l``,
             ``addmm(y, h, B)``: `spellings`) up to the rounding of its scale.
    Skips:   a weight that is used on two inputs, not as a linear, or that trains.
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
            found.padding_unread = {found.node, *found.more} <= rewrite.padding_unread
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
        complete_site(site, rewrite.frozen - {site.weight})
    return len(rewrite.sites)


def _site(weight: fx.Node, args: tuple, calls: int) -> Site | Skip:  # type: ignore[type-arg]
    uses = sorted(products(weight), key=lambda use: use[0])  # in the order of the graph
    if is_trainable(weight):
        return Skip(weight, "the weight trains")
    if args[5] == WITHOUT_GRADIENTS:
        return Skip(
            weight,
            f"{WITHOUT} (a reversible layer, say): a backward that runs it again would not be "
            "sliced",
        )
    if calls > 1 or not _share_input(uses):
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
    site = Site(node, x, weight, transposed, bias, (args[2], args[3]), tuple(args[4]), spec, n, k)
    site.statistics = statistics
    for again, its_view, _ in uses[1:]:
        found = linear_parts(again, its_view)
        assert found is not None
        site.more[again] = found[0]
    return site


def _share_input(uses: list[tuple[fx.Node, fx.Node, bool]]) -> bool:
    """Whether all products read one input, through dropouts and casts perhaps, as DoRA's do: they
    share a choice of channels."""
    if len(uses) < 2:
        return True
    parts = [linear_parts(node, view) for node, view, _ in uses]
    if any(
        op_name(node) != "linear" or part is None or part[2]
        for (node, *_), part in zip(uses, parts, strict=True)
    ):
        return False
    turned = {turned for *_, turned in uses}
    read = {_undropped(part[0]) for part in parts if part is not None}
    unbiased = all(part is not None and part[1] is None for part in parts[1:])
    return len(read) == len(turned) == 1 and unbiased


def _undropped(x: fx.Node) -> fx.Node:
    while op_name(x) in ("dropout", *LINEAR_CASTS) and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


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
    cast = cast_of(site, site.node, site.x)
    if cast is not None:
        a, b = site.factors
        site.factors = (_at_start(a, "to", cast), _at_start(b, "to", cast))


def _at_start(factor: fx.Node, method: str, *args: Any) -> fx.Node:
    """A method of a factor, called before all else."""
    graph = factor.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        return graph.call_method(method, (factor, *args))


def _ends_with(value: Tensor, channels: int) -> bool:
    return same_shape(value.shape[-1:], (channels,))
