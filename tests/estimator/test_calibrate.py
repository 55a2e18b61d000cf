"""Activation-aware factors and statistics: against plain formulas on stored activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselora_fx import EstimatorError, SVDEstimator
from sparselora_fx.estimator.statistics import Moment, aware_factors, column_norms
from sparselora_fx.estimator.svd_estimator import frozen_weights
from sparselora_fx.model.frozen_weights import FrozenWeight
from tests.support import oracle

NAME = "model.layers.0."


def batches(count: int = 3, *, seed: int = 20) -> list[dict[str, Any]]:
    """Batches of different lengths with padding, without labels."""
    made = [oracle.batch(2, 9 + 4 * i, padding=2 + i, seed=seed + i) for i in range(count)]
    return [{k: v for k, v in data.items() if k != "labels"} for data in made]


def build(model: nn.Module, data: Any, **options: Any) -> SVDEstimator:
    return SVDEstimator.build(model, 4, calibration=data, progress=False, **options)


def stored_inputs(model: nn.Module, data: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Every frozen weight's input over the tokens that are no padding, by canonical name."""
    kept: dict[str, list[Tensor]] = {}
    weights = frozen_weights(model)
    model.eval()
    for batch in data:
        real = batch["attention_mask"].bool()

        def keep(w: FrozenWeight, x: Tensor, real: Tensor = real) -> None:
            kept.setdefault(w.canonical, []).append(x[real])

        handles = [
            w.module.register_forward_pre_hook(lambda _, args, w=w, keep=keep: keep(w, args[0]))
            for w in weights
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def test_statistics_are_those_of_the_stored_activations() -> None:
    model = oracle.llama(bias=True, dtype=torch.float64)
    estimator = build(model, batches())
    inputs = stored_inputs(model, batches())
    assert estimator.statistics.keys() == inputs.keys() == estimator.factors.keys()
    for w in frozen_weights(model):
        x, known, weight = inputs[w.canonical], estimator.statistics[w.canonical], w.logical()
        close = {"atol": 1e-10, "rtol": 1e-9}
        torch.testing.assert_close(known.input, x.square().mean(dim=0), **close)
        torch.testing.assert_close(known.norms, weight.norm(dim=0), **close)
        if w.canonical.endswith(("o_proj", "down_proj")):
            energy = (x * weight.norm(dim=0)).square().sum(dim=1, keepdim=True)
            torch.testing.assert_close(known.share, (x.square() / energy).mean(dim=0), **close)
            assert not len(known.offset) and not len(known.output)
            continue
        y = x @ weight.t() + w.module.bias
        torch.testing.assert_close(known.output, y.square().mean(dim=0), **close)


def test_no_affine_map_of_that_rank_is_nearer_to_the_outputs() -> None:
    """Without damping the residual is the tail of the output covariance's eigenvalues."""
    model = oracle.llama(dtype=torch.float64)
    data = batches(6)
    estimator, inputs = build(model, data, damping=0.0), stored_inputs(model, data)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        x = inputs[NAME + name]
        weight = next(w.logical() for w in frozen_weights(model) if w.canonical == NAME + name)
        a, b = estimator.factors[NAME + name]
        y = (x @ weight.t()).detach()
        residual = y - x @ b.t() @ a.t() - estimator.statistics[NAME + name].offset
        tail = torch.linalg.eigvalsh(torch.cov(y.t(), correction=0))[:-4].sum()
        left = float(residual.square().sum(dim=1).mean())  # the SVD is randomised: 1 % above
        assert float(tail) * (1 - 1e-9) <= left <= 1.01 * float(tail)
        plain = SVDEstimator.build(model, 4, progress=False).factors[NAME + name]
        assert float((y - x @ plain.b.t() @ plain.a.t()).norm()) > float(residual.norm())


def test_inputs_with_a_large_mean_keep_their_precision() -> None:
    """fp32 sums around the first mean: a mean a thousand times the spread costs nothing."""
    torch.manual_seed(0)
    x = torch.randn(400, 12, dtype=torch.float64) + 1000
    moment = Moment(torch.ones(12), full=True)
    for part in x.float().split(37):
        moment.add(part)
    expected = torch.cov(x.float().double().t(), correction=0)
    torch.testing.assert_close(moment.covariance().double(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(moment.square(), x.square().mean(dim=0).float(), rtol=1e-5, atol=0)


def test_damping_is_never_too_small_to_factor() -> None:
    """A covariance of rank 1, rounded: the factors exist and are right where the input lives."""
    torch.manual_seed(0)
    direction = torch.randn(10)
    w = torch.randn(7, 10)
    factors, _, _ = aware_factors(
        w, torch.zeros(10), direction[:, None] * direction, 2, damping=0.0, seed=0
    )
    torch.testing.assert_close(factors.a @ (factors.b @ direction), w @ direction)


@pytest.mark.parametrize("limit", [1, 2, None])
@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_passes_do_not_change_the_result(limit: int | None, once: bool) -> None:
    model, data = oracle.llama(layers=2, dtype=torch.float64), batches()
    stream: Iterator[Any] = iter(data)
    got = build(model, stream if once else data, layers_per_pass=limit)
    expected = build(model, data)
    for name, known in expected.statistics.items():
        assert all(torch.equal(a, b) for a, b in zip(known, got.statistics[name], strict=True))
        assert torch.equal(expected.factors[name].a, got.factors[name].a)


def test_weights_that_read_one_input_share_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    before = Moment.__init__

    def counting(self: Moment, norms: Tensor, *, full: bool) -> None:
        made.append(full)
        before(self, norms, full=full)

    monkeypatch.setattr(Moment, "__init__", counting)
    build(oracle.llama(layers=2), batches(1))
    assert made == [True, False, True, False] * 2  # q k v | o | gate up | down


def test_padding_does_not_count() -> None:
    model, data = oracle.llama(dtype=torch.float64), batches()
    other = [dict(batch) for batch in data]
    for batch in other:
        noise = torch.randint(1, oracle.VOCABULARY, batch["input_ids"].shape)
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], noise)
    pairs = zip(data, other, strict=True)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)
    one, two = build(model, data), build(model, other)
    for name, known in one.statistics.items():
        for a, b in zip(known, two.statistics[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_model_is_left_as_it_was() -> None:
    model = oracle.llama(dropout=0.5)
    model.base_model.model.model.layers[0].mlp.eval()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    modes = [module.training for module in model.modules()]
    build(model, batches())
    assert [module.training for module in model.modules()] == modes
    oracle.assert_untouched(model, before, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    built = build(oracle.llama(dtype=dtype), batches())
    built.save(tmp_path / "e")
    loaded = SVDEstimator.load(tmp_path / "e")
    assert loaded.calibrated and loaded.statistics.keys() == built.statistics.keys()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, known in built.statistics.items():
        assert {t.dtype for t in known} == {wide} and loaded.factors[name].a.dtype == dtype
        for a, b in zip(known, loaded.statistics[name], strict=True):
            assert torch.equal(a, b)


def test_without_calibration_nothing_is_added(tmp_path: Path) -> None:
    plain = oracle.estimator_of(oracle.llama())
    assert not plain.calibrated
    plain.save(tmp_path / "plain")
    assert b'\\"version\\": 1' in (tmp_path / "plain").read_bytes()
    assert not SVDEstimator.load(tmp_path / "plain").calibrated


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no batches"),
        ([torch.ones(2, 3)], {}, "a calibration batch is a Tensor; expected a dict"),
        (batches(1), {"damping": -1}, "damping is -1"),
        (batches(1), {"damping": True}, "damping is True"),
        (batches(1), {"layers_per_pass": 0}, "layers_per_pass is 0"),
    ],
)
def test_bad_calibrations(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EstimatorError, match=message):
        build(oracle.llama(), data, **options)


def test_nothing_but_padding_and_broken_activations() -> None:
    (data,) = batches(1)
    with pytest.raises(EstimatorError, match="every token is padding"):
        build(oracle.llama(), [data | {"attention_mask": torch.zeros_like(data["input_ids"])}])
    model = oracle.llama()
    model.base_model.model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(EstimatorError, match=r"q_proj.*calibration inputs hold inf or NaN"):
        build(model, [data])


def test_column_norms_of_half_precision_are_wide() -> None:
    w = torch.full((64, 3), 300.0, dtype=torch.float16)
    torch.testing.assert_close(column_norms(w), torch.full((3,), 2400.0))
