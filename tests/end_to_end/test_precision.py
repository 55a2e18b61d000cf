"""Mixed dtypes: weights cast in the graph, and biases under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle


class CastLinear(nn.Module):
    """A frozen weight kept in fp32 and cast to its input's dtype, with a low-rank branch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.2, requires_grad=False)
        self.down = nn.Parameter(torch.randn(3, inputs, dtype=torch.float64) * 0.2)
        self.up = nn.Parameter(torch.randn(outputs, 3, dtype=torch.float64) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + F.linear(F.linear(x, self.down), self.up)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Net(nn.Module):
    """A gated FFN on embedded tokens, made of any kind of linear."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(oracle.VOCABULARY, 24, dtype=dtype)
        self.a, self.b, self.out = linear(24, 40), linear(24, 40), linear(40, 24)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.out(F.silu(self.a(x)) * self.b(x))


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, **options)
    estimator = oracle.estimator_of(model)
    return slx.compile(model, estimator, plan=plan, backend="aot_eager", shift=True)


def half_labelled() -> dict[str, Any]:
    data = oracle.batch(padding=0)
    del data["attention_mask"]
    data["labels"][:, :7] = -100
    return data


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_weights_cast_to_their_inputs_dtype(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = compiled(Net(CastLinear, torch.float64), tokens=tokens), half_labelled()
    with slx.record(model) as record:
        got = model(**data)
        got.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(record.sites) == 3
    slx.restore(model)
    model.zero_grad()
    dense = F.pad(data["labels"][:, 1:] != -100, (0, 1)) & (tokens == "context")
    for name, (role, chosen) in record.sites.items():
        layer = model.get_submodule(name)

        def project(x: Tensor, layer: Any = layer, role: str = role, kept: Any = chosen) -> Tensor:
            weight = layer.weight.to(x.dtype)
            cut = weight.new_zeros(weight.shape)
            rows = kept if role == "out" else slice(None)
            columns = kept if role == "in" else slice(None)
            cut[rows, columns] = weight[rows, columns]
            return torch.where(dense[..., None], F.linear(x, weight), F.linear(x, cut))

        monkeypatch.setattr(layer, "project", project)
    expected = model(**data)
    expected.square().mean().backward()
    assert oracle.difference(got.detach(), expected.detach()) <= 1e-9
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert oracle.difference(gradients[name], parameter.grad) <= 1e-9, name


@pytest.mark.parametrize("tokens", ["all", "context"])
def test_a_bias_does_not_widen_the_output_under_autocast(tokens: str) -> None:
    def frozen(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs).requires_grad_(False)

    model, data = compiled(Net(frozen, torch.float32), tokens=tokens), half_labelled()
    with torch.autocast("cpu", torch.bfloat16), slx.record(model) as record:
        out = model(**data)
    assert len(record.sites) == 3
    assert out.dtype == torch.bfloat16
