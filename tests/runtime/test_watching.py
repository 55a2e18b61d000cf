"""A probe compares with dense training, changes nothing, and names who is at fault."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.runtime import watching
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny

BOTH = {"layers.0.mlp": 0.6, "layers.1.mlp": 0.5}


def plan_of(sparsity: Any = None, **options: Any) -> slx.SparsityPlan:
    options = {"tokens": "all", "start_step": 0, "channel_multiple": 1} | options
    return slx.SparsityPlan(BOTH if sparsity is None else sparsity, **options)


def compiled(watch: slx.Watch | None, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = tiny(2, dropout=0.1) if model is None else model
    options = {"plan": plan_of(), "backend": "eager"} | options
    return slx.compile(model, oracle.estimator_of(model), watch=watch, **options)


def train(model: nn.Module, steps: int, first: int = 0, **batch: Any) -> list[Tensor]:
    """Plain SGD; the loss of each step."""
    losses = []
    for n in range(first, first + steps):
        slx.step(model, n, 100)
        torch.manual_seed(n)
        loss = model(**oracle.batch(seed=n, **batch)).loss
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    return losses


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise is allowed for: with a tolerance of next to nothing, every third probe trips."""
    for bound in ("SPREADS", "ERRORS"):
        monkeypatch.setattr(f"sparselora_fx.watch.judge.{bound}", 0.0)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("regional", [False, True])
def test_probes_change_nothing_and_compile_nothing(regional: bool) -> None:
    """Losses, adapters, random state, hooks and the number of graphs, with and without a watch."""
    found = []
    for watch in (None, slx.Watch(every=2, tolerance=100)):
        torch.compiler.reset()
        model = compiled(watch, regional=regional)
        before = hooks(model)
        losses = train(model, 5)
        found.append((losses, adapters(model), torch.get_rng_state(), get_runtime(model).graphs))
        assert hooks(model) == before
    (losses, weights, state, graphs), watched = found
    assert all(torch.equal(a, b) for a, b in zip(losses, watched[0], strict=True))
    assert all(torch.equal(value, watched[1][name]) for name, value in weights.items())
    assert torch.equal(state, watched[2]) and graphs == watched[3]
    assert [probe.step for probe in slx.drift(model).probes] == [0, 2, 4]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_gap_and_the_errors_are_those_of_masked_dense() -> None:
    """One sparse region: the masked forward that the probe runs there gives the sparse loss."""
    for key, level in {"layers.0.mlp": 0.6, "layers.0.self_attn": 0.5}.items():
        model = compiled(slx.Watch(every=1), oracle.llama(), plan=plan_of({key: level}))
        data = oracle.batch(padding=0)
        with slx.record(model) as used:
            sparse = model(**data).loss
        (probe,) = slx.drift(model).probes
        slx.restore(model)
        outputs: list[Tensor] = []
        module = model.get_submodule(f"base_model.model.model.{key}")
        handle = module.register_forward_hook(
            lambda m, a, out, into=outputs: into.append(out[0] if isinstance(out, tuple) else out)
        )
        dense = oracle.step(model, data)
        masked = oracle.reference_step(model, data, used)
        handle.remove()
        assert probe.loss_gap == pytest.approx(float(sparse.detach() - dense.loss), abs=1e-6)
        assert float(sparse.detach() - masked.loss) == pytest.approx(0, abs=1e-5)
        assert set(probe.regions) == {f"model.{key}"}
        expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
        assert expected > 0.01
        assert probe.regions[f"model.{key}"] == pytest.approx(expected, rel=1e-4)


def test_dropout_is_no_part_of_the_gap() -> None:
    """The dense loss is that of the same masks: what a dense step from the same seed has."""
    model = compiled(slx.Watch(every=1), tiny(2, dropout=0.5))
    torch.manual_seed(3)
    sparse = model(**oracle.batch()).loss.detach()
    (probe,) = slx.drift(model).probes
    torch.manual_seed(3)
    dense = tiny(2, dropout=0.5)
    torch.manual_seed(3)
    assert probe.loss_gap == pytest.approx(float(sparse - dense(**oracle.batch()).loss), abs=1e-6)


def test_only_context_tokens_are_compared() -> None:
    model = compiled(slx.Watch(every=1), tiny(2), plan=plan_of(tokens="context"))
    data = oracle.batch(samples=2, length=16, padding=0)
    data["labels"][:, :9] = -100
    model(**data).loss.backward()
    (probe,) = slx.drift(model).probes
    assert set(probe.regions) == set(BOTH) and all(e > 0.01 for e in probe.regions.values())


def test_the_history_has_its_format() -> None:
    model = compiled(slx.Watch(every=3, tolerance=100))
    train(model, 4)
    data = json.loads(json.dumps(slx.drift(model).to_json()))
    assert list(data) == ["probes"]
    assert [sorted(p) for p in data["probes"]] == [["action", "loss_gap", "regions", "step"]] * 2
    assert [p["step"] for p in data["probes"]] == [0, 3]
    assert all(set(p["regions"]) == set(BOTH) and p["action"] is None for p in data["probes"])
    with pytest.raises(slx.CompileError, match="not watched"):
        slx.drift(compiled(None))


@pytest.mark.usefixtures("hasty")
def test_an_observer_is_warned_once_and_stop_raises() -> None:
    model = compiled(slx.Watch(every=1, tolerance=1e-7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 5)
    assert sum("drifts from dense" in str(w.message) for w in caught) == 1
    model = compiled(slx.Watch(every=1, tolerance=1e-7, mode="stop"))
    with pytest.raises(slx.DriftError, match="stopped at step 2"):
        train(model, 5)
    assert slx.drift(model).probes[-1].action is not None


@pytest.mark.usefixtures("hasty")
def test_adapt_walks_the_culprit_down_and_never_above_the_plan() -> None:
    model = compiled(slx.Watch(every=1, tolerance=1e-7, mode="adapt"))
    train(model, 7)
    drift = slx.drift(model)
    assert any(p.action and p.action.startswith("down") for p in drift.probes)
    assert all(drift.levels[name] <= BOTH[name] for name in BOTH)
    assert min(drift.levels.values()) < min(BOTH.values())
    # What runs is what the levels say.
    with slx.record(model) as used:
        train(model, 1, first=7)
    level = slx.drift(model).levels["layers.0.mlp"]
    rows = {len(idx) for site, (_, idx) in used.sites.items() if "layers.0." in site}
    assert rows == ({int(40 * (1 - level))} if level else set())


def test_a_loss_that_is_not_finite_names_the_region_and_the_step_runs_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sparse call that returns NaN: the dense loss is trained on, and sparsity goes."""
    model = compiled(slx.Watch(every=50, mode="adapt"))
    train(model, 1)
    runtime = get_runtime(model)
    healthy = model.forward.compiled

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = healthy(*args, **kwargs)
        if runtime.sparse_now and not runtime.caps:
            out = out._replace(loss=out.loss * float("nan"))
        return out

    monkeypatch.setattr(model.forward, "compiled", poisoned)
    with pytest.warns(UserWarning, match="taken DENSE"):
        losses = train(model, 3, first=1)
    assert all(torch.isfinite(loss) for loss in losses)
    probe = slx.drift(model).probes[-1]
    assert probe.step == 1 and "not finite" not in str(probe.regions)
    assert probe.action is not None and probe.action.startswith("down")
    assert set(slx.drift(model).levels.values()) == {0.0}
    assert probe.to_json()["loss_gap"] is None
    assert "fail-safe: 1 sparse steps broke" in slx.explain(model)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (0.0, "are zero")])
def test_gradients_that_are_broken_are_named(value: float, words: str) -> None:
    model = compiled(slx.Watch(every=1, tolerance=100))
    slx.step(model, 0, 10)
    loss = model(**oracle.batch()).loss
    (loss * value).backward()
    with pytest.warns(UserWarning, match="drifts"):
        slx.step(model, 1, 10)
    assert words in slx.drift(model).probes[-1].faults[0]


def test_processes_agree_on_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's probe is worse: both decide by it, between steps, and a rank whose step is
    dense or has broken takes part."""
    model = compiled(slx.Watch(every=1, tolerance=0.5, mode="adapt"))
    worse = {"layers.0.mlp": 0.9, "layers.1.mlp": 0.1}
    mine: list[Any] = []

    def gathered(found: list[Any], own: Any) -> None:
        mine.append(own)
        sliced = {
            n: ("ffn", [w.name for w in get_runtime(model).frozen if n in w.name]) for n in worse
        }
        found[0], found[1] = own, watching.Probe(0, 3.0, dict(worse), sliced=sliced)

    for module in ("watch.probe", "runtime.watching"):
        monkeypatch.setattr(f"sparselora_fx.{module}.processes", lambda: 2)
    monkeypatch.setattr("sparselora_fx.watch.probe.dist.all_gather_object", gathered)
    train(model, 1)
    assert not mine, "agreed within a step"
    healthy, runtime = model.forward.compiled, get_runtime(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if runtime.sparse_now:
            raise RuntimeError("out of memory")
        return healthy(*args, **kwargs)

    monkeypatch.setattr(model.forward, "compiled", broken)
    with pytest.warns(UserWarning, match="taken DENSE"):
        train(model, 3, first=1)
    slx.step(model, 4, 100)
    assert [own is None for own in mine] == [False, True, True, True]
    probes = slx.drift(model).probes
    assert [p.step for p in probes] == [0, 1, 2, 3]
    assert all(p.loss_gap == 3.0 for p in probes)
    assert any("layers.0.mlp to" in (p.action or "") for p in probes)


def test_processes_that_nothing_drives_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselora_fx.runtime.watching.processes", lambda: 2)
    model = compiled(slx.Watch())
    with pytest.raises(slx.WatchError, match=r"sparselora_fx\.step"):
        model(**oracle.batch())
