"""What must hold of a graph after each pass. A fault here is a fault of a pass, not of a user."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sparselora_fx.graph.emit import has_value
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.rewrite.rewrite import Rewrite

_LINEARS = {"linear", "addmm", "matmul", "mm", "__matmul__", "einsum"}
_VIEWS = {"t", "transpose", "permute", "to", "getattr"}


def check(rewrite: Rewrite, ran: str) -> None:
    """Raise AssertionError, naming the pass that has just run, if its graph is not as it must be.

    What a pass has made carries a real value (`graph.emit`). Once sites are found, no marker of
    one is left. Once they are sliced, no dense linear reads a sliced weight, but for the tokens
    that a token split keeps dense.
    """
    rewrite.graph.lint()
    new = [node for node in rewrite.graph.nodes if node not in rewrite.traced]
    unreal = sorted(node.name for node in new if not has_value(node))
    assert not unreal, f"after {ran}: {unreal} have no value"
    if rewrite.counts.get("find_sites") is not None:
        left = [node for node in rewrite.graph.nodes if op_name(node) == "site"]
        assert not left, f"after {ran}: the markers {left} are still in the graph"
    for region in rewrite.regions:
        for site in region.sites if region.rows else ():
            dense = [n for n in _readers(site.weight) if op_name(n) in _LINEARS]
            allowed = 0 if site.split is None else 1 + len(site.more)
            assert len(dense) <= allowed, f"after {ran}: {dense} read a weight that is sliced"


def _readers(weight: fx.Node) -> Iterator[fx.Node]:
    """What reads a weight, through views and casts."""
    for user in weight.users:
        if op_name(user) in _VIEWS:
            yield from _readers(user)
        else:
            yield user
