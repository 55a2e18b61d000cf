"""A site's factors, as the graph uses its weight."""

from __future__ import annotations

from torch import fx
from torch.fx.node import Argument

from sparselora_fx.analysis.regions import Site
from sparselora_fx.ir.score_ops import ACROSS
from sparselora_fx.rewrite.packed import is_packed
from sparselora_fx.rewrite.token_split import cast_of


def fit_factors(site: Site) -> None:
    """Turn and cast the factors of a site as the graph turns and casts its weight."""
    _turn_factors(site)
    _cast_factors(site)


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
    if is_packed(site.weight):  # it unpacks to the dtype of what it multiplies
        made, kept = (node.meta["example_value"].dtype for node in (site.weight, site.factors[0]))
        cast = made if made != kept else None
    if cast is not None:
        a, b = site.factors
        site.factors = (_at_start(a, "to", cast), _at_start(b, "to", cast))


def _at_start(factor: fx.Node, method: str, *args: Argument) -> fx.Node:
    """A method of a factor, called before all else."""
    graph = factor.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        return graph.call_method(method, (factor, *args))
