"""Block-wise compilation: graphs are shared, choices are not, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.runtime.regional import CompiledBlock
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import adapted_nets, layered_models, oracle
from tests.support.slow import slow


def compiled(model: nn.Module, plan: Any = None, **options: Any) -> nn.Module:
    plan = oracle.plan_of(layered_models.EVEN) if plan is None else plan
    options = {"backend": "aot_eager", "regional": True} | options
    return slx.compile(model, oracle.estimator_of(model), plan=plan, **options)


def graphs(layers: int, plan: Any = None) -> int:
    """How many graphs two steps of equal shapes compile."""
    torch.compiler.reset()
    model = compiled(oracle.llama(layers=layers), plan, backend="eager")
    for seed in (1, 2):
        oracle.step(model, oracle.batch(seed=seed))
    return get_runtime(model).graphs


@pytest.mark.parametrize(
    "plan", [layered_models.EVEN, slow(layered_models.UNEVEN)], ids=["even", "uneven"]
)
@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointing"])
def test_layers_do_not_share_choices(plan: dict[str, float], checkpointing: bool | None) -> None:
    """Gradients equal the masked-dense model's; each layer's choice is the one of its own input."""
    model = layered_models.model_of(checkpointing=checkpointing)
    layered_models.check(model, plan, regional=True)


def test_graphs_do_not_grow_with_depth() -> None:
    """One graph for all blocks, also for the first, whose input needs no gradient."""
    assert graphs(2) == graphs(5) == 1


def test_dense_and_sparse_blocks_have_their_own_graphs() -> None:
    """Dense blocks, sparse blocks: two graphs at any depth."""
    plan = oracle.plan_of({"layers.1.mlp": 0.5, "layers.3.mlp": 0.5})
    assert graphs(5, plan) == 2


def test_blocks_below_the_first_adapter_get_no_backward() -> None:
    """Only a block with adapters is given an input that asks for a gradient."""
    model = oracle.llama(layers=3, targets=r".*layers\.[12]\.(mlp|self_attn)\..*_proj")
    compiled(model, backend="eager")
    asked = []

    def note(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        asked.append(output.requires_grad)

    for block in model.get_base_model().model.layers:
        block.register_forward_hook(note)
    oracle.step(model, oracle.batch())
    assert asked == [False, True, True]
    assert get_runtime(model).graphs == 2


class WritesItsInput(nn.Module):
    """A feed-forward block that adds its output to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = adapted_nets.Adapted(adapted_nets.WIDTH, 32)
        self.down = adapted_nets.Adapted(32, adapted_nets.WIDTH)

    def forward(self, x: Tensor) -> None:
        x += self.down(self.up(x * 0.7).relu())


class Written(nn.Module):
    """A model of such blocks, which reads what they were given once more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WritesItsInput() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() * 2.0
        for layer in self.layers:
            layer(x)
        return x


def test_a_block_that_writes_its_input_writes_the_models_tensor() -> None:
    """Also to the first one's, which is given a copy that asks for a gradient."""
    model, x = adapted_nets.build(Written)

    def step() -> oracle.Step:
        model.zero_grad(set_to_none=True)
        loss = adapted_nets.loss_of(model(x))
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return oracle.Step(loss.detach(), gradients)

    compiled(model, oracle.plan_of(0.5))
    with slx.record(model) as record:
        got = step()
    assert len(record.sites) == 4
    slx.restore(model)
    with oracle.masked_reference(model, record):
        oracle.assert_close(got, step(), 1e-9)


@pytest.mark.parametrize("regional", [True, slow(False)], ids=["regional", "broken"])
def test_a_sparse_block_does_not_run_a_dense_blocks_graph(regional: bool) -> None:
    """Dynamo guards no hooks: blocks 1 and 2 differ only in what their hooks read."""
    model = layered_models.model_of(cut=not regional)
    key = "layers.2.mlp" if regional else "layers.2.layer.mlp"
    compiled(model, oracle.plan_of({key: 0.5}), backend="eager", regional=regional)
    with slx.record(model) as record:
        oracle.step(model, oracle.batch())
    assert {name.split(".mlp.")[0] for name in record.sites} == {
        "base_model.model.model." + key.removesuffix(".mlp")
    }


@pytest.mark.slow
def test_restore_leaves_no_trace() -> None:
    model = oracle.llama(layers=2)
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    compiled(model)
    blocks = model.get_base_model().model.layers
    assert all(isinstance(block.forward, CompiledBlock) for block in blocks)
    oracle.step(model, oracle.batch())
    slx.restore(model)
    oracle.assert_untouched(model, before, weights)


def test_evaluation_and_inner_calls_run_the_blocks_own_forward() -> None:
    model, data = oracle.llama(layers=2), oracle.batch()
    inner = model.get_base_model().model
    ids = {key: data[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.eval()(**data).logits
        compiled(model)
        assert torch.equal(model(**data).logits, expected)
        model.train()
        hidden = inner(**ids).last_hidden_state
    assert get_runtime(model).graphs == 0
    slx.restore(model)
    with torch.no_grad():
        assert torch.equal(inner(**ids).last_hidden_state, hidden)


def test_without_blocks_it_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential()
    model.add_module("up", nn.Linear(8, 32))
    model.add_module("down", nn.Linear(32, 8))
    model.requires_grad_(False)
    before = oracle.marks(model)
    with pytest.raises(slx.CompileError, match="numbered blocks"):
        compiled(model, oracle.plan_of(0.5))
    assert oracle.marks(model) == before


def test_explain_names_what_is_outside_the_blocks() -> None:
    model = oracle.llama(layers=2)
    model.add_module("extra", nn.Linear(8, 8).requires_grad_(False))
    compiled(model, oracle.plan_of(0.5), backend="eager")
    oracle.step(model, oracle.batch())
    lines = {line.split()[0]: line for line in slx.explain(model, verbose=True).splitlines()}
    assert "outside the blocks" in lines["extra"]
    assert sum("rewritten (" in line for line in lines.values()) == 14


@pytest.mark.slow
def test_the_switch_from_dense_to_sparse() -> None:
    """Dense steps equal a plain model bit for bit; sparse steps equal a model compiled whole."""
    plan = slx.SparsityPlan(0.5, tokens="all", start_step=2, channel_multiple=1)
    plain, data = oracle.llama(layers=2, dtype=torch.float64), oracle.batch()
    expected = oracle.step(plain, {**data, "use_cache": False})
    model = compiled(oracle.llama(layers=2, dtype=torch.float64), plan)
    slx.step(model, 0)
    oracle.assert_close(oracle.step(model, data), expected, 1e-12)
    slx.step(model, 2)
    with slx.record(model) as record:
        sparse = oracle.step(model, data)
    assert record.sites
    oracle.assert_close(sparse, oracle.reference_step(plain, data, record), 1e-9)
