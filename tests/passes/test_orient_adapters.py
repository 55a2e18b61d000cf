"""LoRA up-projections read their weight column by column, where a region was rewritten."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.orient_adapters import orient_adapters
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after, changes_nothing, keeps_values, shown, text


def ffn(rank: int = 2, *, bias: bool = False) -> Rewrite:
    small = Small()
    x = small.input("x", 2, 3, 8)
    h = small.call(F.silu, small.site(x, "up", 16))
    y = small.site(h, "down", 8)
    branch = small.lora(h, "down", 8, rank)
    if bias:
        branch.args = (*branch.args[:2], small.input("own_bias", 8, trains=True))
    rewrite = small.rewrite(small.call(torch.add, y, branch))
    after(rewrite, find_sites)
    assert after(rewrite, find_regions) == 1
    return rewrite


def test_an_up_projection() -> None:
    rewrite = ffn()
    assert keeps_values(rewrite, orient_adapters) == 1
    assert text(rewrite) == shown("""
        v0 = linear(x, up, None)
        v1 = silu(v0)
        v2 = linear(v1, down, None)
        v3 = linear(v1, down_A, None)
        v4 = t(down_B)
        v5 = contiguous(v4)
        v6 = t(v5)
        v7 = linear(v3, v6, None)
        v8 = add(v2, v7)
        return (v8)
    """)
    changes_nothing(rewrite, orient_adapters)


def test_near_misses_stay() -> None:
    changes_nothing(ffn(rank=4), orient_adapters)  # not much narrower than its output
    changes_nothing(ffn(bias=True), orient_adapters)
    rewrite = ffn()
    rewrite.regions.clear()
    changes_nothing(rewrite, orient_adapters)


def test_other_devices_keep_their_layout() -> None:
    rewrite = ffn()
    for node in rewrite.graph.find_nodes(op="placeholder"):
        if node.target == "down_B":
            node.meta["example_value"] = torch.empty(8, 2, device="meta", requires_grad=True)
    changes_nothing(rewrite, orient_adapters)
