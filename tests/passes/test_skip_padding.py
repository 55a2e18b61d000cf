"""Padding is left out of dense linears too: loss and gradients stay, and its rows are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, fx, nn
from transformers import GPT2Config, GPT2LMHeadModel

import sparselora_fx as slx
from sparselora_fx.analysis.regions import IN_ORDER, MOVED
from sparselora_fx.ir.markers import DENSE
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.skip_padding import skip_padding
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support import oracle
from tests.support.padded_batches import ragged
from tests.support.rewritten_graphs import rewritten, watched
from tests.support.slow import slow
from tests.support.small_graphs import (
    HALF,
    Small,
    after,
    changes_nothing,
    keeps_values,
    list_values,
    shown,
    text,
)
from tests.support.token_batches import by_token, predicting
from tests.support.token_batches import ragged as ragged_prompts

REAL = torch.tensor([[True, True, True], [True, True, False]])


def beside_a_region(
    *, unread: bool = True, sparse: bool = True, lists: int = 4, order: str = IN_ORDER
) -> Rewrite:
    """A region, and a dense linear with a bias of whose rows real tokens' are read."""
    small = Small()
    x = small.input("x", 2, 3, 8, trains=True)
    tokens: tuple[fx.Node, ...] = (small.input("counted", 2, 3, dtype=torch.bool),)
    for name in "corn"[:lists]:
        tokens += small.lists(name, 16, 2, 3)
    spec = HALF if sparse else DENSE
    h = small.call(F.silu, small.site(x, "up", 16, spec=spec, tokens=tokens))
    y = small.site(h, "down", 8, spec=spec, tokens=tokens)
    z = small.site(y, "last", 4, spec=DENSE, tokens=tokens, bias=True)
    # What reads it reads rows of real tokens: here, those of its list.
    taken = small.call(OPS.gather_or_zero_tokens.default, z, *tokens[5:7]) if lists == 4 else z
    rewrite = small.rewrite(taken)
    rewrite.orders = {node: order for node in rewrite.graph.nodes}
    rewrite.padding_unread = frozenset(rewrite.graph.nodes) if unread else frozenset()
    after(rewrite, find_sites, find_regions)
    assert bool(rewrite.regions) == (sparse and order == IN_ORDER)
    return rewrite


def test_a_dense_linear_beside_a_region() -> None:
    rewrite = beside_a_region()
    given = list_values("r", REAL, 16)
    assert keeps_values(rewrite, skip_padding, **given) == 1
    assert text(rewrite) == shown("""
        v0 = linear(x, up, None)
        v1 = silu(v0)
        v2 = linear(v1, down, None)
        v3 = gather_tokens(v2, r_idx, r_pos)
        v4 = linear(v3, last, last_bias)
        v5 = scatter_tokens(v4, r_idx, r_pos)
        v6 = ge(r_pos, 0)
        v7 = unsqueeze(v6, -1)
        v8 = narrow(v4, 0, 0, 1)
        v9 = detach(v8)
        v10 = where(v7, v5, v9)
        v11 = gather_or_zero_tokens(v10, r_idx, r_pos)
        return (v11)
    """)
    changes_nothing(rewrite, skip_padding)


@pytest.mark.parametrize(
    "options",
    [{"unread": False}, {"sparse": False}, {"lists": 2}, {"order": MOVED}],
    ids=["padding is read", "nothing is sparse", "no padding", "rows in another order"],
)
def test_near_misses_stay_dense(options: Any) -> None:
    changes_nothing(beside_a_region(**options), skip_padding)


FIRST = {"layers.0": 0.5}  # the second layer is dense


def plan_of(key: str = "layers.0") -> slx.SparsityPlan:
    return slx.SparsityPlan({key: 0.5}, start_step=0, channel_multiple=1)


def llama(**options: Any) -> nn.Module:
    return oracle.llama(layers=2, dtype=torch.float64, **options)


def gpt2() -> nn.Module:
    """Weights stored the other way round, on flattened tokens, with biases."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, n_positions=32, vocab_size=oracle.VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    lora = oracle.lora_config(("c_attn", "c_proj", "c_fc"))
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # named, lest the graph break before the loss to warn
    return oracle.randomise(get_peft_model(model, lora)).double().train()


@pytest.mark.parametrize("left", [slow(False), True])
@pytest.mark.parametrize("targets", ["all-linear", slow(oracle.ATTENTION_TARGETS)])
def test_a_dense_layer(targets: Any, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ragged(left=left)
    model, found = llama(targets=targets), watched(monkeypatch)
    got = oracle.run_compiled(model, data, plan_of())
    ((_, report),) = found
    assert report.counts["skip_padding"] == 7
    assert len(got.record.sites) == 7
    by_token(model, got.record, predicting(data), "dense")
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-9)


def test_real_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense linears of a layer, and what lies between them, see the list of real tokens."""
    data = ragged()
    graph, _ = rewritten(monkeypatch, llama(targets=oracle.ATTENTION_TARGETS), data, plan_of())
    placed = graph.find_nodes(op="call_function", target=OPS.scatter_tokens.default)
    assert len(placed) == 5  # after q, k, v, o and down: none between gate, up and down
    lists = {node.args[1] for node in placed}
    assert len(lists) == 1
    real = int(data["attention_mask"].sum())
    (held,) = (node.meta["example_value"] for node in lists)
    assert real <= int(held.shape[0]) < data["labels"].numel()


@pytest.mark.parametrize("spare", ["no padding", slow("all tokens")])
def test_without_padding_dense_layers_are_left_alone(
    spare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ragged(samples=1) if spare == "no padding" else ragged()
    plan = plan_of() if spare == "no padding" else oracle.plan_of(FIRST)
    _, report = rewritten(monkeypatch, llama(), data, plan)
    assert report.counts["skip_padding"] == 0


@pytest.mark.slow
def test_padding_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches without padding use the graph for padding, once there is one."""
    model = llama()
    slx.compile(model, oracle.estimator_of(model), plan=plan_of(), backend="eager")
    plain, padded = ragged(samples=1, length=19), ragged(samples=3, length=19)
    steps = []
    for data in (plain, padded, padded, plain, ragged(samples=3, length=21)):
        with slx.record(model) as record:
            steps.append((oracle.step(model, data), record, data))
    slx.restore(model)
    for got, record, data in steps:
        reference = llama()
        by_token(reference, record, predicting(data), "dense")
        oracle.assert_close(got, oracle.step(reference, {**data, "use_cache": False}), 1e-9)


@pytest.mark.slow
def test_weights_stored_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ragged()
    plan = plan_of("h.0")
    _, report = rewritten(monkeypatch, gpt2(), data, plan)
    assert report.counts["skip_padding"] == 4
    model = gpt2()
    got = oracle.run_compiled(model, data, plan)
    assert len(got.record.sites) == 4
    by_token_transposed(model, got.record, predicting(data))
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-9)


def by_token_transposed(model: nn.Module, record: slx.Recording, dense: Tensor) -> None:
    """`token_batches.by_token` for weights stored [K, N]."""

    def patch(module: nn.Module, role: str, chosen: Tensor) -> None:
        weight, bias = module.weight, module.bias
        mask = torch.zeros(weight.shape[1 if role == "out" else 0], dtype=weight.dtype)
        mask[chosen] = 1

        def forward(x: Tensor) -> Tensor:
            full = x @ weight
            cut = full * mask if role == "out" else (x * mask) @ weight
            return torch.where(dense[..., None], full, cut) + bias

        module.forward = forward  # type: ignore[method-assign]

    for name, (role, chosen) in record.sites.items():
        patch(model.get_submodule(name), role, chosen)


def test_trimmed_logits() -> None:
    """Rows that the loss asks for go before rows that are real."""
    data = ragged()
    model = llama()
    got = oracle.run_compiled(model, data, plan_of(), trim_logits=True)
    by_token(model, got.record, predicting(data), "dense")
    # Llama's loss is computed in fp32, here over fewer rows.
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-6)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """fp32, with batches of several lengths; the attention is dense."""
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=plan_of("layers.0.mlp"))
    steps = []
    for length in (17, 23):
        data = ragged(length=length)
        with slx.record(model) as record:
            steps.append((oracle.step(model, data), record, data))
    slx.restore(model)
    for got, record, data in steps:
        reference = oracle.llama()
        by_token(reference, record, predicting(data), "dense")
        oracle.assert_close(got, oracle.step(reference, {**data, "use_cache": False}), 1e-4)


def mixed(y: Tensor) -> Tensor:
    """Neighbouring tokens, padding or not."""
    return y + 0.3 * F.pad(y[:, 1:], (0, 0, 0, 1))


@pytest.mark.parametrize("layer", [slow(0), 2])
def test_rows_that_are_mixed_are_kept(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears before a reader that mixes rows compute padding; those after it do not."""

    def model_of() -> nn.Module:
        model = oracle.llama(layers=3, dtype=torch.float64)
        block = model.get_base_model().model.layers[layer]
        block.mlp.down_proj = oracle.Behind(block.mlp.down_proj, mixed)
        return model

    data, plan = ragged(), plan_of("layers.1")
    _, report = rewritten(monkeypatch, model_of(), data, plan)
    assert report.counts["skip_padding"] == (7 if layer == 0 else 0)
    if layer == 2:
        return  # nothing is left out, so nothing can have changed
    model = model_of()
    got = oracle.run_compiled(model, data, plan)
    by_token(model, got.record, predicting(data), "dense")
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-9)


def test_attention_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.get_base_model().set_attn_implementation("eager")
    _, report = rewritten(monkeypatch, model, ragged(), plan_of("layers.0"))
    assert report.counts["skip_padding"] == 7


def test_padding_that_predicts_a_label_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ragged_prompts(left=True)
    _, report = rewritten(monkeypatch, llama(), data, plan_of())
    assert report.counts["skip_padding"] == 0


class Gated(nn.Module):
    """A feed-forward block with one more gate, which is frozen and dense."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.side = nn.Linear(48, 1, dtype=torch.float64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(hidden * torch.sigmoid(self.side(x)))


@pytest.mark.slow
def test_a_gate_beside_a_sparse_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region that reads what a dense linear returns is found with padding as without."""
    torch.manual_seed(0)
    sparse = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 0.5)
    found = []
    for samples in (1, 3):
        model = oracle.llama(layers=1, dtype=torch.float64)
        block = model.get_base_model().model.layers[0]
        block.mlp = Gated(block.mlp)
        plan = slx.SparsityPlan(sparse, start_step=0, channel_multiple=1)
        _, report = rewritten(monkeypatch, model, ragged(samples), plan)
        found.append([region.kind for region in report.regions])
    assert found[0] == found[1] == ["ffn"]
