"""LoRA up-projections of one shape are one batched matmul, where launches are to be few."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparselora_fx import environment
from sparselora_fx.passes.batch_adapters import batch_adapters
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.join_adapters import join_adapters
from sparselora_fx.rewrite.joining import join_alike
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after, changes_nothing, keeps_values, shown, text

pytestmark = pytest.mark.usefixtures("as_on_gpu")


def gated(*size: int) -> Rewrite:
    """``down(silu(gate(x)) * up(x))`` with LoRA on gate and up, whose down-projections are one."""
    small = Small()
    x = small.input("x", *size, trains=True)

    def linear(name: str) -> fx.Node:
        return small.call(torch.add, small.site(x, name, 16), small.lora(x, name, 16))

    gate, up = linear("gate"), linear("up")
    h = small.call(torch.mul, small.call(F.silu, gate), up)
    rewrite = small.rewrite(small.site(h, "down", 8))
    after(rewrite, find_sites)
    assert after(rewrite, find_regions) == 1
    assert after(rewrite, join_adapters) == 2
    return rewrite


def test_two_up_projections_are_one_batch() -> None:
    rewrite = gated(2, 3, 8)
    assert keeps_values(rewrite, batch_adapters) == 2
    assert text(rewrite) == shown("""
        v0 = linear(x, gate, None)
        v1 = cat([gate_A, up_A])
        v2 = linear(x, v1)
        v3 = narrow(v2, -1, 0, 4)
        v4 = flatten(v3, 0, -2)
        v5 = unflatten(v4, -1, (2, 2))
        v6 = transpose(v5, 0, 1)
        v7 = stack([gate_B, up_B])
        v8 = transpose(v7, 1, 2)
        v9 = bmm(v6, v8)
        v10 = unbind(v9)
        v11 = size(v2, 0)
        v12 = size(v2, 1)
        v13 = getitem(v10, 0)
        v14 = view(v13, v11, v12, 16)
        v15 = getitem(v10, 1)
        v16 = view(v15, v11, v12, 16)
        v17 = add(v0, v14)
        v18 = linear(x, up, None)
        v19 = add(v18, v16)
        v20 = silu(v17)
        v21 = mul(v20, v19)
        v22 = linear(v21, down, None)
        return (v22)
    """)
    changes_nothing(rewrite, batch_adapters)


def test_flat_tokens() -> None:
    assert keeps_values(gated(6, 8), batch_adapters) == 2


def several(widths: dict[str, int], ranks: dict[str, int]) -> Rewrite:
    """Gated linears that read one input, with branches of several widths and ranks, in the region
    of the first two; all down-projections are one."""
    small = Small()
    x = small.input("x", 2, 3, 16, trains=True)
    made = {}
    for name, width in widths.items():
        branch = small.lora(x, name, width, ranks[name])
        made[name] = small.call(torch.add, small.site(x, name, width), branch)
    first, second, *others = made.values()
    h = small.call(torch.mul, small.call(F.silu, first), second)
    rewrite = small.rewrite(small.site(h, "down", 16), *others)
    after(rewrite, find_sites)
    assert after(rewrite, find_regions) == 1
    downs = {node for node in small.graph.nodes if node.name.endswith("_a")}
    assert join_alike(small.graph, lambda node: bool(downs & set(node.all_input_nodes))) == 3
    return rewrite


EQUAL = dict.fromkeys(("gate", "up", "third"), 16)


@pytest.mark.parametrize(
    ("widths", "ranks", "batched"),
    [
        (EQUAL, dict.fromkeys(EQUAL, 2), 3),
        (EQUAL | {"third": 32}, dict.fromkeys(EQUAL, 2), 2),
        (EQUAL, {"gate": 2, "up": 2, "third": 4}, 2),
        ({"gate": 16, "third": 16, "up": 16} , {"gate": 2, "third": 4, "up": 2}, 0),
    ],
    ids=["three alike", "another width", "another rank", "not side by side"],
)  # fmt: skip
def test_those_alike_and_side_by_side(
    widths: dict[str, int], ranks: dict[str, int], batched: int
) -> None:
    assert keeps_values(several(widths, ranks), batch_adapters) == batched


def test_other_devices_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "shares_launches", lambda device: device == "cuda")
    changes_nothing(gated(2, 3, 8), batch_adapters)


def test_cut_gradients_and_dense_graphs_keep_them() -> None:
    rewrite = gated(2, 3, 8)
    rewrite.cuts_gradients = True
    changes_nothing(rewrite, batch_adapters)
    rewrite.cuts_gradients = False
    rewrite.regions.clear()
    changes_nothing(rewrite, batch_adapters)


def test_what_is_written_to_stays() -> None:
    """Autograd refuses to let one of several views be written to."""
    rewrite = gated(2, 3, 8)
    add = next(iter(rewrite.graph.find_nodes(op="call_function", target=torch.add)))
    branch = add.args[1]
    with rewrite.graph.inserting_before(add):
        scaled = rewrite.graph.call_method("mul_", (branch, 2.0))
    scaled.meta["example_value"] = branch.meta["example_value"]
    add.replace_input_with(branch, scaled)
    changes_nothing(rewrite, batch_adapters)
