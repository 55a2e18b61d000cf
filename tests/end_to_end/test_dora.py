"""DoRA: the frozen product is sliced, its scale per output channel is not.

The reference is the user's eager model, in which every product with a recorded frozen weight,
whichever line of PEFT's makes it, is masked on the context tokens.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import sparselora_fx as slx
from tests.support import oracle
from tests.support.masked_products import MaskedProducts, randomise_dora, reference_step
from tests.support.slow import slow

BOUND = 1e-10
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def model_of(*, layers: int = 1, bias: bool = False, **words: Any) -> nn.Module:
    """A tiny Llama in fp64 with DoRA whose magnitudes are not the norms of their rows."""
    base = oracle.llama(layers=layers, bias=bias).unload()
    words = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True, **words}
    model = get_peft_model(base, LoraConfig(**words)).double().train()
    return randomise_dora(model)


def assert_sliced(model: nn.Module, record: slx.Recording, count: int = 7) -> None:
    assert len(record.sites) == count, sorted(record.sites)


CASES: dict[str, dict[str, Any]] = {
    "bias and rslora": {"bias": True, "use_rslora": True},
    "dropout and bias": {"lora_dropout": 0.3, "bias": True},
    "producers only": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "consumers only": {"target_modules": ["o_proj", "down_proj"], "lora_dropout": 0.3},
}


@pytest.mark.parametrize(
    "words", [slow(v) if "only" in k else v for k, v in CASES.items()], ids=CASES
)
def test_sliced_is_masked_dense(words: dict[str, Any]) -> None:
    """Loss and the gradients of A, B and the magnitudes; every linear of both regions sliced."""
    model, data = model_of(**words), oracle.batch()
    got = oracle.run_compiled(model, data, backend="eager")
    assert_sliced(model, got.record)
    assert any("magnitude" in name for name in got.gradients)
    oracle.assert_close(got, reference_step(model, data, got.record), BOUND)


@pytest.mark.slow
def test_only_context_tokens_are_sliced() -> None:
    """Both products of each weight are dense on output tokens, also in a checkpointed block."""
    model, data = model_of(lora_dropout=0.3, bias=True), oracle.batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    data["labels"][:, :7] = -100
    output = F.pad(data["labels"][:, 1:] != -100, (0, 1))
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1)
    got = oracle.run_compiled(model, data, plan, "aot_eager")
    assert_sliced(model, got.record)
    oracle.assert_close(got, reference_step(model, data, got.record, ~output), BOUND)


def test_sparse_branches() -> None:
    """`lora_branch="sparse"` cuts the branches; the norms stay those of whole rows."""
    model, data = model_of(lora_dropout=0.3), oracle.batch()
    got = oracle.run_compiled(model, data, backend="eager", lora_branch="sparse")
    assert_sliced(model, got.record)
    oracle.assert_close(got, reference_step(model, data, got.record, sparse=True), BOUND)


def test_the_choice_sees_the_scale() -> None:
    """A channel whose magnitude is tiny is chosen last: factors are scaled as rows are."""
    model, data = model_of(), oracle.batch()
    layer = model.get_base_model().model.layers[0]
    small = torch.arange(0, 112, 4)
    with torch.no_grad():
        layer.mlp.up_proj.lora_magnitude_vector["default"].weight[small] *= 1e-6
    got = oracle.run_compiled(model, data, oracle.plan_of({"mlp": 0.5}), backend="eager")
    (chosen,) = got.record.selections.values()
    assert not set(chosen["ffn"].tolist()) & set(small.tolist())


@pytest.mark.slow
def test_sparsity_0_is_plain_and_restore_takes_all_off() -> None:
    model, data = model_of(), oracle.batch()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    got = oracle.run_compiled(model, data, oracle.plan_of(0.0), "aot_eager")
    oracle.assert_untouched(model, before, weights)
    oracle.assert_identical(got, oracle.plain_compiled_step(model, data, "aot_eager"))


class Twice(nn.Module):
    """A feed-forward whose up-projection is used again, on ``other(x)``."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((16, 40), (40, 16)))
        self.requires_grad_(False)
        self.other, self.scale = other, nn.Parameter(torch.rand(40))

    def forward(self, x: Tensor) -> Tensor:
        again = F.linear(self.other(x), self.up.weight) * self.scale
        return self.down(torch.tanh(self.up(x) + again)).square().mean()


NEAR = {
    "dropout": (lambda x: F.dropout(x, 0.5), 2),
    "another input": (lambda x: x + 1, 0),
    "other rows": (lambda x: x.flip(1), 0),
}


@pytest.mark.parametrize(("other", "sliced"), NEAR.values(), ids=NEAR)
def test_products_of_one_input_share_a_choice(other: Any, sliced: int) -> None:
    """Two products are one site only where both read the same tokens, dropout aside."""
    torch.compiler.reset()
    model = Twice(other).double().train()
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.5), backend="eager")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    results = []
    with slx.record(model) as record:
        torch.manual_seed(2)
        model(x).backward()
    results.append(model.scale.grad.clone())
    assert len(record.sites) == sliced, slx.explain(model, verbose=True)
    slx.restore(model)
    model.zero_grad()
    torch.manual_seed(2)
    with MaskedProducts(model, record):
        model(x).backward()
    results.append(model.scale.grad)
    assert oracle.difference(*results) < BOUND
