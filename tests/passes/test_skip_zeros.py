"""Down-projections read a selection of what is zero elsewhere: loss and gradients stay, and the
full width is neither computed nor saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, fx, nn
from transformers import Phi3Config, Phi3ForCausalLM

import sparselora_fx as slx
from sparselora_fx.analysis.regions import IN_ORDER
from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.passes.sink_producers import sink_producers
from sparselora_fx.passes.skip_zeros import skip_zeros
from sparselora_fx.passes.slice_sites import slice_sites
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support import oracle
from tests.support.rewritten_graphs import count, rewritten, watched
from tests.support.slow import slow
from tests.support.small_graphs import (
    F64,
    Small,
    after,
    changes_nothing,
    keeps_values,
    list_values,
    shown,
    text_after_choice,
)
from tests.support.token_batches import by_token, predicting, ragged


def on_small_graph(between: Callable[[Small, fx.Node], fx.Node], *, split: bool = False) -> Rewrite:
    """``down(f(up(x)))`` with LoRA on down, sliced: f is read where up's selection left zeros."""
    small = Small()
    x = small.input("x", 2, 3, 8)
    tokens: tuple[fx.Node, ...] = ()
    if split:
        counted = small.input("counted", 2, 3, dtype=torch.bool)
        tokens = (counted, *small.lists("c", 4, 2, 3), *small.lists("o", 4, 2, 3))
    h = between(small, small.site(x, "up", 16, tokens=tokens))
    down = small.site(h, "down", 8, tokens=tokens)
    rewrite = small.rewrite(small.call(torch.add, down, small.lora(h, "down", 8)))
    rewrite.orders = {node: IN_ORDER for node in rewrite.graph.nodes}
    after(rewrite, find_sites, find_regions, sink_producers, insert_predictor, slice_sites)
    assert len(rewrite.regions) == 1
    return rewrite


def test_a_down_projection_on_zeros() -> None:
    rewrite = on_small_graph(lambda s, y: s.call(F.silu, y))
    assert keeps_values(rewrite, skip_zeros) == 1
    assert text_after_choice(rewrite) == shown("""
        v7 = sliced_linear(x, up, v6)
        v8 = scatter_channels(v7, v6, 16)
        v9 = silu(v8)
        v10 = gather_channels(v9, v6)
        v11 = sliced_linear_in(v10, down, v6)
        v12 = gather_channels(v9, v6)
        v13 = sliced_linear_in(v12, down_A, v6)
        v14 = linear(v13, down_B, None)
        v15 = add(v11, v14)
        return (v15)
    """)
    changes_nothing(rewrite, skip_zeros)


def test_a_token_split_has_zeros_in_context_tokens_alone() -> None:
    rewrite = on_small_graph(lambda s, y: s.call(F.silu, y), split=True)
    context = torch.tensor([[True, True, False], [True, False, False]])
    given = list_values("c", context, 4) | list_values("o", ~context, 4)
    assert keeps_values(rewrite, skip_zeros, counted=context, **given) == 1
    changes_nothing(rewrite, skip_zeros)


ZERO_AT_ZERO: dict[str, Callable[[Small, fx.Node], fx.Node]] = {
    "relu": lambda s, y: s.call(F.relu, y),
    "gelu": lambda s, y: s.call(F.gelu, y, approximate="tanh"),
    "tanh": lambda s, y: s.call(torch.mul, s.call(torch.tanh, s.call(torch.div, y, 3)), 3),
    "squared": lambda s, y: s.call("pow", s.call(F.relu, y), 2),
    "cast": lambda s, y: s.call("to", s.call("to", y, torch.float32), F64),
    "clamped": lambda s, y: s.call("clamp", y, min=-0.1, max=0.1),
    "gated": lambda s, y: s.call(torch.mul, y, s.call(torch.sigmoid, y)),
    "gated by another": lambda s, y: s.call(
        torch.mul, s.call(F.silu, y), s.input("factor", 2, 3, 1)
    ),
    "flattened": lambda s, y: s.call("reshape", s.call(F.silu, y), 6, 16),
}


@pytest.mark.parametrize("name", ZERO_AT_ZERO)
def test_functions_that_are_zero_at_zero(name: str) -> None:
    rewrite = on_small_graph(ZERO_AT_ZERO[name])
    assert keeps_values(rewrite, skip_zeros) == 1
    changes_nothing(rewrite, skip_zeros)


NOT_ZERO: dict[str, Callable[[Small, fx.Node], fx.Node]] = {
    "sigmoid": lambda s, y: s.call(torch.sigmoid, y),
    "shifted": lambda s, y: s.call(F.silu, s.call(torch.add, y, 0.25)),
    "clamped": lambda s, y: s.call("clamp", y, min=0.125),
    "cosine": lambda s, y: s.call(torch.cos, y),
    "biased": lambda s, y: s.call(F.silu, s.call(torch.add, y, s.input("b", 16))),
    "divided by": lambda s, y: s.call(torch.div, 1.0, s.call("exp", y)),
}


@pytest.mark.parametrize("name", NOT_ZERO)
def test_functions_that_are_not_zero_at_zero_are_read_whole(name: str) -> None:
    changes_nothing(on_small_graph(NOT_ZERO[name]), skip_zeros)


PAPER = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the paper's LoRA targets
WIDTH = 112


def plan_of(tokens: str, key: str = "mlp") -> slx.SparsityPlan:
    return slx.SparsityPlan({key: 0.5}, tokens=tokens, start_step=0, channel_multiple=1)


def activated(function: Any, **options: Any) -> nn.Module:
    """A Llama with the paper's LoRA targets and another activation."""
    model = oracle.llama(targets=PAPER, dtype=torch.float64, **options)
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Lambda(function)
    return model


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[no-any-return]


def compare(model: nn.Module, tokens: str, **options: Any) -> None:
    """The compiled step against the masked-dense one."""
    data = ragged()
    got = oracle.run_compiled(model, data, plan_of(tokens), **options)
    assert got.record.sites
    branch = options.get("lora_branch", "dense")
    if tokens == "all":
        oracle.assert_close(got, oracle.reference_step(model, data, got.record), 1e-9)
        return
    by_token(model, got.record, predicting(data), branch)
    oracle.assert_close(got, oracle.step(model, {**data, "use_cache": False}), 1e-9)


@pytest.mark.parametrize("dropout", [slow(0.0), 0.1])
@pytest.mark.parametrize("tokens", [slow("all"), "context"])
def test_the_papers_targets(tokens: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(monkeypatch)
    compare(oracle.llama(targets=PAPER, dtype=torch.float64, dropout=dropout), tokens)
    ((graph, report),) = found
    assert report.counts["skip_zeros"] == 1
    assert count(graph, OPS.sliced_linear_in.default) == 2  # the frozen down and its adapter
    assert count(graph, OPS.scatter_channels.default) == 0  # nothing has the full width
    assert count(graph, OPS.gather_channels.default) == (dropout > 0)  # of its random mask


@pytest.mark.parametrize("tokens", [slow("all"), "context"])
def test_nothing_of_the_full_width_is_saved(tokens: str) -> None:
    """From the joint graph's saved tensors: context tokens leave no row of N values behind."""
    data = oracle.batch(4, 40, padding=0)
    data["labels"][:, :33] = -100  # 28 output tokens in a list of 32, and 132 context tokens
    model = oracle.llama(targets=PAPER, dtype=torch.float64)
    slx.compile(model, oracle.estimator_of(model), plan=plan_of(tokens), backend="aot_eager")
    shapes: list[tuple[int, ...]] = []

    def pack(kept: Tensor) -> Tensor:
        shapes.append(tuple(kept.shape))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        model(**data).loss.backward()
    slx.restore(model)
    parameters = {tuple(p.shape) for p in model.parameters()}
    wide = [s for s in shapes if WIDTH in s and s not in parameters and s[::-1] not in parameters]
    # Those of output tokens are dense, and saved: the test does see what there is.
    assert set(wide) == ({(32, WIDTH)} if tokens == "context" else set())


@pytest.mark.parametrize("name", ["squared", slow("gated")])
def test_a_model_whose_function_is_zero_at_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stand for those that small graphs hold above."""
    function = {
        "squared": lambda x: F.relu(x).pow(2),
        "gated": lambda x: x * torch.sigmoid(1.7 * x),
    }[name]
    found = watched(monkeypatch)
    compare(activated(function), "context")
    ((_, report),) = found
    assert report.counts["skip_zeros"] == 1


@pytest.mark.parametrize("name", [slow("cosine"), slow("biased"), "gate"])
def test_a_model_whose_function_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is not zero outside the selection is read whole."""
    if name == "gate":
        model = oracle.llama(targets=(*PAPER, "gate_proj"), dtype=torch.float64)
    else:
        model = activated(torch.cos if name == "cosine" else F.silu, bias=name == "biased")
    found = watched(monkeypatch)
    compare(model, "context")
    ((_, report),) = found
    assert report.counts["skip_zeros"] == 0


def phi3() -> nn.Module:
    """Gate and up in one weight, without an adapter."""
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=48, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=oracle.VOCABULARY, pad_token_id=oracle.PADDING,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = get_peft_model(Phi3ForCausalLM(config), oracle.lora_config(("down_proj",)))
    return oracle.randomise(model).double().train()


@pytest.mark.parametrize("tokens", ["all", slow("context")])
def test_a_fused_gate(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(monkeypatch)
    compare(phi3(), tokens)
    ((graph, report),) = found
    assert report.counts["skip_zeros"] == 1
    assert count(graph, OPS.scatter_channels.default) == 0


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["all", "context"])
def test_a_sparse_branch_reads_its_selection_alone(
    tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``lora_branch="sparse"`` says of any down projection what the gate says of these."""

    def model() -> nn.Module:
        return oracle.llama(dtype=torch.float64)

    _, report = rewritten(monkeypatch, model(), ragged(), plan_of(tokens), lora_branch="sparse")
    assert report.counts["skip_zeros"] == 1
    data = ragged()
    got = oracle.run_compiled(model(), data, plan_of(tokens), lora_branch="sparse")
    reference = model()
    if tokens == "all":
        expected = oracle.reference_step(reference, data, got.record, lora_branch="sparse")
    else:
        by_token(reference, got.record, predicting(data), "sparse")
        expected = oracle.step(reference, {**data, "use_cache": False})
    oracle.assert_close(got, expected, 1e-9)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """fp32, with sizes that vary."""
    model = oracle.llama(targets=PAPER)
    plan = plan_of("context")
    slx.compile(model, oracle.estimator_of(model), plan=plan)
    steps = []
    for length in (17, 23):
        data = ragged(length=length)
        with slx.record(model) as record:
            steps.append((oracle.step(model, data), record, data))
    slx.restore(model)
    for got, record, data in steps:
        reference = oracle.llama(targets=PAPER)
        by_token(reference, record, predicting(data), "dense")
        oracle.assert_close(got, oracle.step(reference, {**data, "use_cache": False}), 1e-4)


class Spelled(nn.Module):
    """A down-projection with its adapter, every argument passed by its name."""

    def __init__(self, peft: nn.Module) -> None:
        super().__init__()
        self.base = peft.base_layer
        self.a, self.b = (side["default"].weight for side in (peft.lora_A, peft.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(input=F.dropout(input=x, p=0.1), weight=self.a)
        scaled = torch.div(input=F.linear(input=narrow, weight=self.b), other=3.0)
        return torch.add(input=self.base(x), other=scaled)


@pytest.mark.parametrize("tokens", ["all", slow("context")])
def test_arguments_passed_by_name(tokens: str) -> None:
    model = oracle.llama(targets=PAPER, dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if name.endswith("mlp"):
            module.down_proj = Spelled(module.down_proj)
    compare(model, tokens)
