"""`record` and `explain` tell what was done: several matrices in a module, a block that is applied
several times, code that no graph reaches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparselora_fx as slx
from sparselora_fx.model.frozen_weights import frozen_weights

VOCABULARY, WIDTH, CHANNELS = 31, 16, 40


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.2, requires_grad=False)


class Model(nn.Module):
    """An embedding, a middle that tests fill in, a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(input_ids))).square().mean()


class Held(nn.Module):
    """A hand-written layer that holds its matrices itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = matrix(CHANNELS, WIDTH), matrix(WIDTH, CHANNELS)
        self.mix = matrix(WIDTH, WIDTH)
        self.kept: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(F.silu(F.linear(x, self.up) * self.kept) * self.kept, self.down)
        return F.linear(F.linear(h, self.mix).tanh(), self.mix)


class Matrices(Model):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Held()

    def middle(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Applied(Model):
    """One block that is applied several times (ALBERT); ``run`` says how."""

    def __init__(self, run: Callable[..., Tensor], times: int = 2) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, CHANNELS).requires_grad_(False)
        self.down = nn.Linear(CHANNELS, WIDTH).requires_grad_(False)
        self.run, self.times = run, times

    def block(self, x: Tensor) -> Tensor:
        return F.layer_norm(x + self.down(F.silu(self.up(x))) * 3, (WIDTH,))

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.run(self.block, x)
        return x


def directly(block: Any, x: Tensor) -> Tensor:
    return block(x)


def checkpointed(block: Any, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def broken(block: Any, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return block(x)


def compiled(model: nn.Module, plan: Any = 0.5, **options: Any) -> nn.Module:
    found = slx.SVDEstimator.build(model, rank=4, progress=False)
    plan = slx.SparsityPlan(
        plan, channel_multiple=1, **{"start_step": 0, "tokens": "all"} | options
    )
    return slx.compile(model, found, plan=plan, backend="eager")


def batch(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(ids)
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def with_masks(model: Applied, masks: list[Tensor]) -> Applied:
    """The block's uses keep these channels, one mask each in the order of the forward."""
    up, down = model.up, model.down
    rows, columns = iter(masks), iter(masks)
    up.forward = lambda x: F.linear(x, up.weight) * next(rows) + up.bias  # type: ignore[method-assign]
    down.forward = lambda x: F.linear(x * next(columns), down.weight, down.bias)  # type: ignore[method-assign]
    return model


def mask(kept: Tensor) -> Tensor:
    return torch.zeros(CHANNELS, dtype=torch.float64).index_fill(0, kept, 1.0)


def assert_same(got: Any, expected: Any, dense: Any) -> None:
    assert not torch.isclose(expected[0], dense[0], rtol=1e-6), "nothing was sparse"
    assert torch.isclose(got[0], expected[0], rtol=1e-12), (got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- several matrices in a module


def test_each_matrix_of_a_module_has_a_name() -> None:
    torch.manual_seed(0)
    model = Matrices().double().train()
    reference, ids = copy.deepcopy(model), batch()
    assert [w.name for w in frozen_weights(model)] == ["mlp.up", "mlp.down", "mlp.mix"]
    assert {w.place for w in frozen_weights(model)} == {"mlp"}
    compiled(model)
    with slx.record(model) as record:
        got = step(model, ids)
    assert set(record.sites) == {"mlp.up", "mlp.down"} and set(record.selections) == {"mlp"}
    rows = {line.split()[0]: line for line in slx.explain(model, verbose=True).splitlines()}
    assert "rewritten (rows)" in rows["mlp.up"] and "40x16" in rows["mlp.up"]
    assert "rewritten (columns)" in rows["mlp.down"]
    assert "dense: the weight is used" in rows["mlp.mix"]
    dense = step(reference, ids)
    assert torch.equal(record.sites["mlp.up"][1], record.sites["mlp.down"][1])
    reference.mlp.kept = mask(record.sites["mlp.up"][1])
    assert_same(got, step(reference, ids), dense)


def test_a_plan_names_one_matrix_of_a_module() -> None:
    torch.manual_seed(0)
    model = Matrices().double().train()
    compiled(model, {"mlp": 0.5, "mlp.down": 0.0})
    step(model, batch())
    rows = {line.split()[0]: line for line in slx.explain(model, verbose=True).splitlines()}
    assert "the plan keeps it dense" in rows["mlp.down"]
    assert "the plan keeps it dense" not in rows["mlp.up"]


def test_two_feed_forwards_of_one_module_are_recorded_both() -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            for name in "ab":
                setattr(self, f"{name}_up", nn.Linear(WIDTH, CHANNELS).requires_grad_(False))
                setattr(self, f"{name}_down", nn.Linear(CHANNELS, WIDTH).requires_grad_(False))

        def middle(self, x: Tensor) -> Tensor:
            x = x + self.a_down(F.silu(self.a_up(x)))
            return x + self.b_down(F.silu(self.b_up(x)))

    torch.manual_seed(0)
    model = compiled(Two().double().train())
    for seed in (1, 2):
        with slx.record(model) as record:
            step(model, batch(seed))
            step(model, batch(seed + 5))
        assert set(record.selections) == {"", "#2"}
        for key, name in (("", "a_up"), ("#2", "b_up")):
            assert torch.equal(record.selections[key]["ffn"], record.sites[name][1])


# ---------------------------------------------------------------- a block applied several times


@pytest.mark.parametrize("run", [checkpointed, broken], ids=["checkpointed", "graph breaks"])
@pytest.mark.parametrize("times", [2, 3])
def test_every_choice_of_a_repeated_block_is_recorded(run: Any, times: int) -> None:
    torch.manual_seed(0)
    model = Applied(run, times).double().train()
    reference, ids = copy.deepcopy(model), batch()
    reference.run = directly
    compiled(model)
    with slx.record(model) as record:
        step(model, batch(7))  # replaced by the next call
        got = step(model, ids)
    numbers = ["", *(f"#{i}" for i in range(2, times + 1))]
    assert set(record.sites) == {f"{name}{n}" for name in ("up", "down") for n in numbers}
    kept = [record.sites[f"up{n}"][1] for n in numbers]
    assert [k.tolist() for k in kept] == [record.selections[n]["ffn"].tolist() for n in numbers]
    assert len({tuple(k.tolist()) for k in kept}) == times, "choices agree: the test shows nothing"
    dense = step(reference, ids)
    assert_same(got, step(with_masks(reference, [mask(k) for k in kept]), ids), dense)
    table = slx.explain(model, verbose=True)
    assert f"{times} uses, each with a choice of its own" in table, table


def test_a_call_with_fewer_uses_leaves_no_old_entries() -> None:
    torch.manual_seed(0)
    model = compiled(Applied(checkpointed, 3).double().train())
    with slx.record(model) as record:
        step(model, batch())
        model.times = 2
        step(model, batch())
    assert set(record.sites) == {"up", "up#2", "down", "down#2"}
    assert set(record.selections) == {"", "#2"}


# ---------------------------------------------------------------- why nothing was traced


def middle_row(model: nn.Module) -> str:
    (row,) = [
        line for line in slx.explain(model, verbose=True).splitlines() if line.startswith("up ")
    ]
    return row


def test_code_that_is_kept_from_compiling_is_named() -> None:
    @torch.compiler.disable
    def apart(block: Any, x: Tensor) -> Tensor:
        return block(x)

    model = compiled(Applied(apart).double().train())
    assert "not traced yet" in middle_row(model)
    step(model, batch())
    assert "torch.compile leaves to plain PyTorch" in middle_row(model)


def test_a_compiler_that_is_switched_off_is_named() -> None:
    model = compiled(Applied(directly).double().train())
    with torch.compiler.set_stance("force_eager"):
        step(model, batch())
    assert "torch.compile leaves to plain PyTorch" in middle_row(model)


def test_dense_steps_are_named() -> None:
    model = compiled(Applied(directly).double().train(), start_step=3)
    slx.step(model, 0, 10)
    step(model, batch())
    assert "dense in every training call so far (the schedule was dense)" in middle_row(model)


def test_calls_past_the_compiled_forward_are_named() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids)

    model = compiled(Outer(Applied(directly).double()).train())
    step(model.inner, batch())
    (row,) = [
        line
        for line in slx.explain(model, verbose=True).splitlines()
        if line.startswith("inner.up ")
    ]
    assert "past the compiled forward" in row


def test_calls_without_sparse_tokens_are_named() -> None:
    class Labelled(Applied):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids) + labels.double().mean()

    model = Labelled(directly).double().train()
    compiled(model, tokens=lambda arguments: torch.zeros(2, 9, dtype=torch.bool))
    model(batch(), labels=batch()).backward()
    assert "dense: hardly a token was sparse in any step so far" in middle_row(model)
