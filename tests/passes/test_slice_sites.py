"""Each site by its definition: what a region computes is the masked-dense product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparselora_fx.analysis.regions import IN_ORDER
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.passes.slice_sites import slice_sites
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support.small_graphs import (
    F64,
    Small,
    after,
    changes_nothing,
    fresh,
    list_values,
    shown,
    text_after_choice,
    values_of,
)

CONTEXT = torch.tensor([[True, True, False], [True, False, False]])


def ffn(*, split: bool = False, kn: bool = False, branch: str = "dense") -> Rewrite:
    """``down(silu(up(x)))`` with a bias and LoRA on both; returns also the selection."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    tokens: tuple[fx.Node, ...] = ()
    if split:
        counted = small.input("counted", 2, 3, dtype=torch.bool)
        tokens = (counted, *small.lists("c", 4, 2, 3), *small.lists("o", 4, 2, 3))

    def linear(x: fx.Node, name: str, out: int) -> fx.Node:
        if kn:
            w = small.input(name, x.meta["example_value"].shape[-1], out)
            y = small.call(torch.matmul, small.marked(x, w, tokens=tokens), w)
        else:
            y = small.site(x, name, out, bias=True, tokens=tokens)
        return small.call(torch.add, y, small.lora(x, name, out))

    h = small.call(F.silu, linear(x, "up", 16))
    rewrite = small.rewrite(
        linear(h, "down", 8), options=Options(channel_multiple=1, lora_branch=branch)
    )
    rewrite.orders = {node: IN_ORDER for node in rewrite.graph.nodes}
    after(rewrite, find_sites, find_regions, insert_predictor)
    (region,) = rewrite.regions
    output = rewrite.graph.output_node()
    output.args = ((*output.args[0], region.choices[0].selection),)  # type: ignore[misc]
    return rewrite


def inputs_of(rewrite: Rewrite) -> dict[str, Tensor]:
    given = {
        node.name: torch.randn(node.meta["example_value"].shape, dtype=F64)
        for node in rewrite.graph.find_nodes(op="placeholder")
        if node.meta["example_value"].dtype == F64
    }
    if "counted" in {node.name for node in rewrite.graph.nodes}:
        given |= {"counted": CONTEXT} | list_values("c", CONTEXT, 4)
        given |= list_values("o", ~CONTEXT, 4)
    return given


def named(given: dict[str, Tensor], rewrite: Rewrite) -> dict[str, Tensor]:
    """Inputs by the names that a test has given them."""
    nodes = rewrite.graph.find_nodes(op="placeholder")
    return {str(n.target): given[n.name] for n in nodes if n.name in given}


def masked_dense(
    given: dict[str, Tensor], chosen: Tensor, *, split: bool, kn: bool, branch: str
) -> Tensor:
    """The definition, token by token: outside the choice zero, on context tokens alone."""
    mask = torch.zeros(16, dtype=F64)
    mask[chosen] = 1
    here = CONTEXT[..., None] if split else torch.tensor(True)

    def cut(value: Tensor) -> Tensor:
        return torch.where(here, value * mask, value)

    def weight(name: str) -> Tensor:
        return given[name].T if kn else given[name]

    def lora(x: Tensor, name: str) -> Tensor:
        return x @ given[f"{name}_A"].T @ given[f"{name}_B"].T

    biases = [torch.zeros(n, dtype=F64) if kn else given[f"{name}_bias"]
              for name, n in (("up", 16), ("down", 8))]  # fmt: skip
    sparse = branch == "sparse"
    side = lora(given["x"], "up")
    h = F.silu(cut(given["x"] @ weight("up").T) + biases[0] + (cut(side) if sparse else side))
    return cut(h) @ weight("down").T + biases[1] + lora(cut(h) if sparse else h, "down")


@pytest.mark.parametrize("branch", ["dense", "sparse"])
@pytest.mark.parametrize("kn", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize("split", [False, True])
def test_sliced_is_masked_dense(split: bool, kn: bool, branch: str) -> None:
    rewrite = ffn(split=split, kn=kn, branch=branch)
    assert after(rewrite, slice_sites) == 2
    given = inputs_of(rewrite)
    got, chosen, *gradients = values_of(rewrite, **given)
    leaves = {k: v.clone().requires_grad_("_A" in k or "_B" in k)
              for k, v in named(given, rewrite).items()}  # fmt: skip
    expected = masked_dense(leaves, chosen, split=split, kn=kn, branch=branch)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    training = [t for t in leaves.values() if t.requires_grad]
    wanted = torch.autograd.grad((expected * expected.detach().cos()).sum(), training)
    assert len(gradients) == len(wanted) == 4
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    changes_nothing(fresh(rewrite), slice_sites)


def test_the_nodes_of_a_producer_and_a_consumer() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    h = small.call(F.silu, small.site(x, "up", 16))
    rewrite = small.rewrite(small.site(h, "down", 8))
    after(rewrite, find_sites, find_regions, insert_predictor)
    assert after(rewrite, slice_sites) == 2
    assert text_after_choice(rewrite) == shown("""
        v7 = sliced_linear(x, up, v6)
        v8 = scatter_channels(v7, v6, 16)
        v9 = silu(v8)
        v10 = gather_channels(v9, v6)
        v11 = sliced_linear_in(v10, down, v6)
        return (v11)
    """)


def without_a_region(small: Small, x: fx.Node) -> Any:
    up = small.site(x, "up", 16)
    return small.site(small.call(F.silu, up), "down", 8), up


def test_sites_of_no_region_stay() -> None:
    small = Small()
    rewrite = small.rewrite(*without_a_region(small, small.input("x", 2, 3, 8)))
    after(rewrite, find_sites, find_regions, insert_predictor)
    changes_nothing(rewrite, slice_sites)
