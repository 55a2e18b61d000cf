"""PEFT's adapters on stacks of matrices run outside the graphs: identical calls compile nothing."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sparselora_fx as slx

WIDTH = 16
SMALL = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 31,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


class Experts(nn.Module):
    """Two experts' matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.stack[0]).relu() + x @ self.stack[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        return x + self.experts(x)


def adapted() -> nn.Module:
    config = LoraConfig(
        r=2, target_modules=["up", "down"], target_parameters=["experts.stack"],
        init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(Model(), config).train()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_identical_calls_compile_once() -> None:
    model, x = adapted(), torch.randn(2, 5, WIDTH)
    expected = gradients(model, x)
    plan = slx.SparsityPlan({"up": 0.0}, start_step=0)
    with pytest.warns(UserWarning, match="1 modules .* run uncompiled"):
        slx.compile(model, slx.SVDEstimator.build(model, rank=2), plan=plan, backend="eager")
    seen = []
    for _ in range(3):
        got = gradients(model, x)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[0] == seen[1] == seen[2] > 0
    assert got.keys() == expected.keys() and any("experts" in name for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    slx.restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_mixtures_of_experts(kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL, **EXPERTS[kind])
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    slx.compile(model, slx.SVDEstimator.build(model, rank=2), plan=plan, backend="eager")
    ids = torch.randint(31, (2, 9))
    seen = []
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[0] == seen[1] == seen[2] > 0
