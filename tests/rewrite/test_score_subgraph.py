"""Scores: each op against its formula, each word against an independent computation of the
selection, and sliced equals masked-dense with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.ir.ops import OPS
from sparselora_fx.plan.score import TERMS, Score, parse_score
from tests.support import oracle
from tests.support.slow import slow

MLP, ATTENTION = "base_model.model.model.layers.0.mlp", "base_model.model.model.layers.0.self_attn"
SCORES = (
    "pooled", "pooled+weighted", "tokens", "tokens+normalised", "strided:5", "prior",
    "prior+weighted+normalised", "tokens+prior+weighted", "strided:7+prior+weighted",
    "tokens+prior+weighted+normalised", "strided:6+weighted",
)  # fmt: skip
FEW = ("tokens+normalised", "strided:7+prior+weighted")
HEADS, KV_HEADS, DIM = 6, 2, 8


def few(score: str) -> Any:
    """Every term is in some score of `FEW`, but for pooled, which `layered_models.check` computes
    again; the others are slow."""
    return score if score in FEW else slow(score)


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------ ops


def test_sampled_tokens_are_counted_and_evenly_spaced() -> None:
    x = torch.arange(20.0).view(2, 10, 1)
    counted = torch.zeros(2, 10, dtype=torch.bool)
    counted[0, 2:8] = counted[1, ::2] = True  # tokens 2..7 and 10, 12, 14, 16, 18
    assert OPS.sample_tokens(x, counted, 4).flatten().tolist() == [2, 4, 7, 14]
    assert OPS.sample_tokens(x, None, 5).flatten().tolist() == [0, 4, 8, 12, 16]
    few = OPS.sample_tokens(x, counted, 64).flatten()
    assert sorted(set(few.tolist())) == [2, 3, 4, 5, 6, 7, 10, 12, 14, 16, 18]
    other = torch.ones(3, 4, dtype=torch.bool)  # another grid: every token counts
    assert OPS.sample_tokens(x, other, 2).flatten().tolist() == [0, 10]
    assert OPS.sample_tokens(x, torch.zeros_like(counted), 3).shape == (3, 1)
    for grid in (None, counted, counted[:0]):
        assert OPS.sample_tokens(x[:0], grid, 3).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_energy_of_counted_tokens(normalise: bool, weighted: bool) -> None:
    h, counted = values(2, 5, 7), torch.rand(2, 5) < 0.6
    norms = values(7, seed=1).abs() if weighted else None
    got = OPS.channel_energy(h, counted, norms, normalise)
    square = h[counted].square()
    if normalise:
        scale = 1 if norms is None else norms.square()
        square = square / (square * scale).sum(dim=1, keepdim=True)
    torch.testing.assert_close(got, square.mean(dim=0))
    nothing = OPS.channel_energy(h, torch.zeros_like(counted), norms, normalise)
    assert torch.equal(nothing, torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("offset", [None, values(7, seed=4)])
def test_low_rank_energy_is_the_energy_of_the_product(
    normalise: bool, offset: Tensor | None
) -> None:
    z, a, norms = values(2, 5, 3), values(7, 3, seed=1), values(7, seed=2).abs()
    counted = torch.rand(2, 5) < 0.6
    full = z @ a.t() + (0 if offset is None else offset)
    for weights in (None, norms):
        got = OPS.low_rank_energy(z, a, offset, counted, weights, normalise)
        torch.testing.assert_close(got, OPS.channel_energy(full, counted, weights, normalise))


def test_half_precision_is_summed_in_float32() -> None:
    h = torch.full((4096, 2), 8.0, dtype=torch.float16)  # the sum of squares would overflow
    got = OPS.channel_energy(h, None, None, False)
    assert got.dtype == torch.float32 and got.tolist() == [64.0, 64.0]


# ------------------------------------------------------------------------------ words


def test_words_in_any_order() -> None:
    expected = Score("strided", 32, prior=True, weighted=True)
    assert parse_score("strided:32+prior+weighted") == expected
    assert parse_score("weighted + prior+strided:32") == expected
    assert parse_score("pooled") == Score()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token", "allowed: one of pooled, tokens, strided and prior"),
        ("", "allowed: one of"),
        (3, "allowed: one of"),
        ("pooled+tokens", "says a thing twice"),
        ("prior+prior", "says a thing twice"),
        ("weighted", "looks at nothing"),
        ("tokens:4", "only 'strided' takes a count"),
        ("strided:0", "only 'strided' takes a count"),
        ("strided:x", "only 'strided' takes a count"),
    ],
)
def test_bad_words(text: Any, message: str) -> None:
    with pytest.raises(slx.PlanError, match=message):
        slx.SparsityPlan(0.5, score=text)


def test_score_and_tracking_in_a_file(tmp_path: Path) -> None:
    plan = slx.SparsityPlan(0.5, score="tokens+weighted", track_adapter=True)
    plan.to_yaml(tmp_path / "plan.yaml")
    assert slx.SparsityPlan.from_yaml(tmp_path / "plan.yaml") == plan
    (tmp_path / "bad.yaml").write_text("sparsity: 0.5\nscore: best\n")
    with pytest.raises(slx.PlanError, match="score is 'best'"):
        slx.SparsityPlan(tmp_path / "bad.yaml")
    with pytest.raises(slx.PlanError, match="track_adapter is 1"):
        slx.SparsityPlan(0.5, track_adapter=1)


def test_a_prior_needs_calibration() -> None:
    model = oracle.llama()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    with pytest.raises(slx.EstimatorError, match="calibration=batches"):
        slx.compile(model, oracle.estimator_of(model), plan=plan_of("prior", MLP))
    oracle.assert_untouched(model, before, weights)


# ------------------------------------------------------------------------------ selection


def plan_of(score: str | None, region: str, **options: Any) -> slx.SparsityPlan:
    settings = {"tokens": "all", "start_step": 0, "channel_multiple": 2, "score": score} | options
    return slx.SparsityPlan({region.removeprefix("base_model.model."): 0.5}, **settings)


def calibrated(model: nn.Module) -> slx.SVDEstimator:
    data = [oracle.batch(2, 11, seed=s) for s in (31, 32)]
    return slx.SVDEstimator.build(model, 4, calibration=data, progress=False)


def chosen(
    model: nn.Module, estimator: slx.SVDEstimator, data: dict[str, Any], plan: slx.SparsityPlan
) -> dict[str, dict[str, Tensor]]:
    slx.compile(model, estimator, plan=plan, backend="eager")
    with slx.record(model) as record:
        model(**data)
    slx.restore(model)
    return record.selections


def inputs_of(model: nn.Module, data: dict[str, Any], name: str) -> Tensor:
    """The input of a layer's first linear in the dense training forward."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    target = layer.gate_proj if hasattr(layer, "gate_proj") else layer.q_proj
    handle = target.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    model(**data, use_cache=False)
    handle.remove()
    return found[0]


class Plain:
    """Scores written out, token by token, without the library's ops."""

    def __init__(self, model: nn.Module, estimator: slx.SVDEstimator, score: Score) -> None:
        self.model, self.estimator, self.score = model, estimator, score
        self.track = False

    def energies(self, h: Tensor, norms: Tensor) -> Tensor:
        square = h.square()
        if self.score.normalised:
            scale = norms.square()
            square = square / (square * scale).sum(dim=1, keepdim=True)
        return square.mean(dim=0)

    def rows(self, x: Tensor, mask: Tensor, *, pool: bool) -> Tensor:
        if self.score.context == "pooled" and pool:
            return torch.stack([sample[m].mean(dim=0) for sample, m in zip(x, mask, strict=True)])
        real = x[mask]
        if self.score.context != "strided":
            return real
        n = self.score.samples
        return real[torch.tensor([i * len(real) // n for i in range(n)])]

    def linear(self, name: str, rows: Tensor) -> Tensor:
        canonical = name.removeprefix("base_model.model.")
        a, b = self.estimator.factors[canonical]
        out = rows @ b.t() @ a.t()
        known = self.estimator.statistics.get(canonical)
        if known is not None:
            out = out + known.offset.to(rows.dtype)
        layer = self.model.get_submodule(name)
        if layer.base_layer.bias is not None and self.score.context != "pooled":
            out = out + layer.base_layer.bias
        if self.track:
            for key, down in layer.lora_A.items():
                out = out + layer.scaling[key] * layer.lora_B[key](down(rows))
        return out

    def known(self, name: str) -> Any:
        return self.estimator.statistics[name.removeprefix("base_model.model.")]

    def ffn(self, x: Tensor, mask: Tensor) -> Tensor:
        norms = self.model.get_submodule(f"{MLP}.down_proj").weight.norm(dim=0)
        score = torch.zeros(112, dtype=x.dtype)
        if self.score.context:
            rows = self.rows(x, mask, pool=True)
            h = F.silu(self.linear(f"{MLP}.gate_proj", rows)) * self.linear(f"{MLP}.up_proj", rows)
            score = score + self.energies(h, norms)
        if self.score.prior:
            known = self.known(f"{MLP}.down_proj")
            score = score + (known.share if self.score.normalised else known.input)
        return score * norms.square() if self.score.weighted else score

    def head(self, letter: str, x: Tensor, mask: Tensor, norms: Tensor) -> Tensor:
        name = f"{ATTENTION}.{letter}_proj"
        width = self.model.get_submodule(name).weight.shape[0]
        energy = torch.zeros(width, dtype=x.dtype)
        if self.score.context:
            energy = self.energies(self.linear(name, self.rows(x, mask, pool=False)), norms)
        if self.score.prior:
            prior = self.known(name).output
            total = (prior * norms.square()).sum() if self.score.normalised else 1
            energy = energy + prior / total
        return energy

    def qk(self, x: Tensor, mask: Tensor) -> Tensor:
        ones = torch.ones((), dtype=x.dtype)
        q = self.head("q", x, mask, ones).view(KV_HEADS, HEADS // KV_HEADS, DIM)
        k = self.head("k", x, mask, ones).view(KV_HEADS, DIM)
        return (q.sqrt().mean(dim=1) * k.sqrt()).flatten()

    def v(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = self.model.get_submodule(f"{ATTENTION}.o_proj").weight
        grouped = weight.view(-1, KV_HEADS, HEADS // KV_HEADS, DIM)
        columns = grouped.square().sum(dim=(0, 2)).sqrt().flatten()
        score = self.head("v", x, mask, columns if self.score.weighted or self.score.normalised
                          else torch.ones((), dtype=x.dtype)).sqrt()  # fmt: skip
        return score * columns if self.score.weighted else score


def best(score: Tensor) -> list[int]:
    return score.topk(len(score) // 2).indices.sort().values.tolist()


def check_selection(score: str, *, track: bool = False, plain: bool = False) -> None:
    model = oracle.llama(bias=True, dtype=torch.float64, seed=3)
    if track:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.6)
    estimator = oracle.estimator_of(model) if plain else calibrated(model)
    reference = Plain(model, estimator, parse_score(score))
    reference.track = track
    data = oracle.batch(3, 9, padding=2, seed=7)
    mask = data["attention_mask"].bool()
    x = inputs_of(model, data, MLP)
    options = {"track_adapter": track}
    got = chosen(model, estimator, data, plan_of(score, MLP, **options))
    assert got[MLP]["ffn"].tolist() == best(reference.ffn(x, mask))
    x = inputs_of(model, data, ATTENTION)
    got = chosen(model, estimator, data, plan_of(score, ATTENTION, **options))
    assert got[ATTENTION]["qk"].tolist() == best(reference.qk(x, mask))
    assert got[ATTENTION]["v"].tolist() == best(reference.v(x, mask))


@pytest.mark.parametrize("score", [few(s) for s in SCORES])
def test_the_graph_selects_what_the_formula_says(score: str) -> None:
    check_selection(score)


@pytest.mark.parametrize(
    "score", [s if s == "tokens+normalised" else slow(s) for s in SCORES if "prior" not in s]
)
def test_without_calibration(score: str) -> None:
    check_selection(score, plain=True)


@pytest.mark.parametrize(
    "score", [slow("pooled"), "tokens+weighted", slow("strided:9+prior+weighted")]
)
@pytest.mark.parametrize("plain", [False, slow(True)], ids=["calibrated", "plain"])
def test_tracking_scores_with_the_adapters_of_now(score: str, plain: bool) -> None:
    """After a strong change of lora_B the selection is that of the factors plus s B A, exactly."""
    if not (plain and "prior" in score):
        check_selection(score, track=True, plain=plain)


@pytest.mark.slow
def test_tracking_matters() -> None:
    """The comparison above can fail: with such adapters the selections differ."""
    model = oracle.llama(dtype=torch.float64, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.6)
    estimator, data = oracle.estimator_of(model), oracle.batch()
    for region in (MLP, ATTENTION):
        fixed, tracked = (
            chosen(model, estimator, data, plan_of(None, region, track_adapter=flag))[region]
            for flag in (False, True)
        )
        assert all(fixed[name].tolist() != tracked[name].tolist() for name in fixed)


@pytest.mark.slow
def test_context_tokens_alone_count() -> None:
    """With labels on some tokens, changing the content of the others' rows changes the choice as
    the formula says: only tokens without loss are looked at."""
    model = oracle.llama(dtype=torch.float64, seed=3)
    estimator, data = calibrated(model), oracle.batch(3, 12, padding=2, seed=7)
    data["labels"][:, :5] = -100
    dense = F.pad(data["labels"][:, 1:] != -100, (0, 1)) & data["attention_mask"].bool()
    context = data["attention_mask"].bool() & ~dense
    x = inputs_of(model, data, MLP)
    for score in ("tokens+weighted", "strided:6+weighted", "tokens+normalised", "pooled"):
        plan = plan_of(score, MLP, tokens="context")
        got = chosen(model, estimator, data, plan)[MLP]["ffn"]
        reference = Plain(model, estimator, parse_score(score))
        assert got.tolist() == best(reference.ffn(x, context)), score


@pytest.mark.slow
def test_the_default_follows_the_estimator() -> None:
    model, data = oracle.llama(dtype=torch.float64), oracle.batch()
    for estimator, words in (
        (oracle.estimator_of(model), "strided+weighted"),
        (calibrated(model), "strided+prior+weighted"),
    ):
        default, named = (
            chosen(model, estimator, data, plan_of(score, MLP))[MLP]["ffn"].tolist()
            for score in (None, words)
        )
        assert default == named


# ------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("track", [slow(False), True], ids=["frozen", "tracked"])
@pytest.mark.parametrize(
    "score",
    [
        s if s == "strided:7+prior+weighted" else slow(s)
        for s in SCORES
        if s not in ("pooled", "tokens", "prior", "tokens+normalised")
    ],
)
def test_sliced_equals_masked_dense(score: str, track: bool) -> None:
    model, data = oracle.llama(bias=True, dtype=torch.float64), oracle.batch()
    plan = slx.SparsityPlan(oracle.mixed(model), tokens="all", start_step=0, channel_multiple=1,
                            score=score, track_adapter=track)  # fmt: skip
    slx.compile(model, calibrated(model), plan=plan, backend="aot_eager")
    with slx.record(model) as record:
        got = oracle.step(model, data)
    slx.restore(model)
    oracle.assert_rewrote(record, model, oracle.mixed(model))
    oracle.assert_close(got, oracle.reference_step(model, data, record), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("track", [False, True], ids=["frozen", "tracked"])
def test_inductor_selects_the_same(track: bool) -> None:
    model, data = oracle.llama(bias=True), oracle.batch()
    data["labels"][:, :6] = -100
    estimator = calibrated(model)
    picked = []
    for backend in ("eager", "inductor"):
        plan = plan_of(None, "layers.0", tokens="context", track_adapter=track)
        slx.compile(model, estimator, plan=plan, backend=backend)
        with slx.record(model) as record:
            model(**data).loss.backward()
        slx.restore(model)
        picked.append({k: {n: i.tolist() for n, i in v.items()} for k, v in
                       record.selections.items()})  # fmt: skip
    assert picked[0] == picked[1] and picked[0]


def test_every_word_is_explained() -> None:
    assert all(len(text) > 20 for text in TERMS.values())
