"""`slice_packed`: of a quantised weight only what is multiplied is unpacked."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import sparselora_fx as slx
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL, COLUMNS, ROWS
from tests.support import oracle
from tests.support.quantised_models import NF4, dequantised, quantised_llama
from tests.support.rewritten_graphs import count, rewritten


def test_every_product_reads_the_packed_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    data["labels"][:, :5] = -100
    plan = oracle.plan_of({"mlp": 0.5, "self_attn": 0.5})
    graph, report = rewritten(monkeypatch, model, data, plan)
    products = graph.find_nodes(op="call_function", target=OPS.packed_linear.default)
    assert sorted(node.args[5] for node in products) == [ROWS] * 5 + [COLUMNS] * 2
    assert all((node.args[4] is None) == (node.args[5] == ALL) for node in products)
    assert count(graph, OPS.unpack.default) == 0
    inputs = graph.find_nodes(op="placeholder")
    sites = {inputs[site.weight] for region in report.regions for site in region.sites}
    assert sites == {node.args[1] for node in products}
    assert report.counts["slice_packed"] == 7


def test_output_tokens_read_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    data["labels"][:, :5] = -100
    plan = slx.SparsityPlan({"mlp": 0.5}, start_step=0, channel_multiple=1)
    graph, _ = rewritten(monkeypatch, model, data, plan)
    products = graph.find_nodes(op="call_function", target=OPS.packed_linear.default)
    assert sorted(node.args[5] for node in products) == [ALL] * 3 + [ROWS] * 2 + [COLUMNS]
    weights = {node.args[1] for node in products}
    assert len(weights) == 3 and not any(
        user.target is torch.nn.functional.linear for weight in weights for user in weight.users
    )


@pytest.mark.slow
def test_passes_do_to_a_quantised_model_what_they_do_to_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context and output tokens stay apart between the linears: what stands for a quantised weight
    reads nothing of what is multiplied with it."""
    model, data = quantised_llama(tmp_path, NF4), oracle.batch()
    data["labels"][:, :5] = -100
    plan = slx.SparsityPlan({"mlp": 0.5, "self_attn": 0.5}, start_step=0, channel_multiple=1)
    plain = dequantised(model).float()
    graph, _ = rewritten(monkeypatch, model, data, plan)
    expected, _ = rewritten(monkeypatch, plain, data, plan)
    ours, theirs = (Counter(map(op_name, found.nodes)) for found in (graph, expected))
    moved = ("gather_tokens", "gather_channels", "scatter_two_lists", "scatter_channels", "silu")
    assert [ours[name] for name in moved] == [theirs[name] for name in moved]
    products = ("packed_linear", "linear", "sliced_linear", "sliced_linear_in")
    assert sum(ours[name] for name in products) == sum(theirs[name] for name in products)
    assert ours["silu"] == 2 and ours["scatter_two_lists"] > 0
