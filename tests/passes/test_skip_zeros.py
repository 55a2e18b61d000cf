"""Down-projections read a selection of what is zero elsewhere: loss and gradients stay, and the
full width is neither computed nor saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from tests.support import oracle
from tests.support.rewritten_graphs import count, rewritten
from tests.support.token_batches import by_token, predicting, ragged

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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", ["all", "context"])
def test_the_papers_targets(tokens: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        return oracle.llama(targets=PAPER, dtype=torch.float64, dropout=dropout)

    graph, report = rewritten(monkeypatch, model(), ragged(), plan_of(tokens))
    assert report.counts["skip_zeros"] == 1
    assert count(graph, OPS.sliced_linear_in.default) == 2  # the frozen down and its adapter
    assert count(graph, OPS.scatter_channels.default) == 0  # nothing has the full width
    assert count(graph, OPS.gather_channels.default) == (dropout > 0)  # of its random mask
    compare(model(), tokens)


@pytest.mark.parametrize("tokens", ["all", "context"])
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


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "squared", "halved", "clamped", "gated"])
def test_functions_that_are_zero_at_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = {
        "relu": F.relu,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "tanh": lambda x: 3 * torch.tanh(x / 3),
        "squared": lambda x: F.relu(x).pow(2),
        "halved": lambda x: x.div(2).to(torch.float32).to(torch.float64),
        "clamped": lambda x: x.clamp(min=-0.1, max=0.1),
        "gated": lambda x: x * torch.sigmoid(1.7 * x),
    }[name]
    _, report = rewritten(monkeypatch, activated(function), ragged(), plan_of("context"))
    assert report.counts["skip_zeros"] == 1
    bound = {"halved": 1e-6}  # of its own rounding to fp32
    model, data = activated(function), ragged()
    got = oracle.run_compiled(model, data, plan_of("all"))
    oracle.assert_close(got, oracle.reference_step(model, data, got.record), bound.get(name, 1e-9))


@pytest.mark.parametrize("name", ["sigmoid", "shifted", "clamped", "cosine", "biased", "gate"])
def test_functions_that_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is not zero outside the selection is read whole."""
    function = {
        "sigmoid": torch.sigmoid,
        "shifted": lambda x: F.silu(x + 0.25),
        "clamped": lambda x: x.clamp(min=0.125),
        "cosine": torch.cos,
    }.get(name, F.silu)

    def model() -> nn.Module:
        if name == "gate":
            return oracle.llama(targets=(*PAPER, "gate_proj"), dtype=torch.float64)
        return activated(function, bias=name == "biased")

    _, report = rewritten(monkeypatch, model(), ragged(), plan_of("context"))
    assert report.counts["skip_zeros"] == 0
    compare(model(), "context")


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


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_a_fused_gate(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, report = rewritten(monkeypatch, phi3(), ragged(), plan_of(tokens))
    assert report.counts["skip_zeros"] == 1
    assert count(graph, OPS.scatter_channels.default) == 0
    compare(phi3(), tokens)


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


def test_compiled_by_inductor() -> None:
    """fp32, with sizes that vary."""
    model = oracle.llama(layers=2, targets=PAPER)
    plan = plan_of("context")
    slx.compile(model, oracle.estimator_of(model), plan=plan)
    steps = []
    for length in (17, 23):
        data = ragged(length=length)
        with slx.record(model) as record:
            steps.append((oracle.step(model, data), record, data))
    slx.restore(model)
    for got, record, data in steps:
        reference = oracle.llama(layers=2, targets=PAPER)
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


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_arguments_passed_by_name(tokens: str) -> None:
    model = oracle.llama(targets=PAPER, dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if name.endswith("mlp"):
            module.down_proj = Spelled(module.down_proj)
    compare(model, tokens)
