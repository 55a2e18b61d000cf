"""Attentions are judged by what slicing them returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparselora_fx as slx
from benchmarks.support import quality_rows
from benchmarks.support.attention_quality import (
    ORACLE,
    Attentions,
    Cases,
    exact,
    is_llama,
    of_attentions,
)
from benchmarks.support.random_factors import noise

LAYERS = 2


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for _ in range(count):
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[0, 7:] = 0
        ids = torch.randint(0, 40, (3, 12), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@pytest.fixture(scope="module")
def cases(llama: LlamaForCausalLM) -> Cases:
    return Cases.of(llama, batches())


def plain(llama: LlamaForCausalLM) -> slx.SVDEstimator:
    return of_attentions(slx.SVDEstimator.build(llama, 4, progress=False))


def whole(llama: LlamaForCausalLM) -> slx.SVDEstimator:
    known = plain(llama)
    return exact(known, {name: llama.get_parameter(f"{name}.weight") for name in known.factors})


def test_side_by_side_attentions_return_what_they_return_in_the_model(
    llama: LlamaForCausalLM, cases: Cases
) -> None:
    returned: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _, args, out: returned.append(out[0]))
        for layer in llama.model.layers
    ]
    batch = batches()[0]
    llama(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    for mine, theirs in zip(cases.dense[0], returned, strict=True):
        torch.testing.assert_close(mine[mask], theirs[mask])


def test_exact_factors_are_the_weights(llama: LlamaForCausalLM) -> None:
    known = whole(llama)
    assert len(known.factors) == 4 * LAYERS
    for name, (a, b) in known.factors.items():
        assert torch.equal(a @ b, llama.get_parameter(f"{name}.weight"))


def test_errors_are_those_of_the_sliced_attention(llama: LlamaForCausalLM, cases: Cases) -> None:
    """By hand: the same plan compiled again, and its output beside the dense one."""
    judged = cases.find_best(whole(llama), 0.5)
    assert len(judged) == 2 * LAYERS
    assert all(each.overlap == 1 for each in judged)
    model = Attentions(llama).train()
    plan = slx.SparsityPlan({"self_attn": 0.5}, tokens="all", start_step=0, channel_multiple=1,
                            score=ORACLE)  # fmt: skip
    slx.compile(model, whole(llama), plan=plan, backend="eager")
    batch = cases.data[1]
    sparse = model(**batch).detach()
    slx.restore(model)
    mask = batch["attention_mask"].bool()
    for n in range(LAYERS):
        dense = cases.dense[1][n][mask]
        lost = (sparse[n][mask] - dense).norm(dim=-1)
        found = judged[LAYERS + n]
        assert found.error == pytest.approx(float(lost.norm() / dense.norm()), rel=1e-5)
        assert found.token_error == pytest.approx(
            float((lost / dense.norm(dim=-1)).mean()), rel=1e-5
        )
        assert found.error > 0.01


def test_a_choice_that_knows_beats_one_that_does_not(llama: LlamaForCausalLM, cases: Cases) -> None:
    best = cases.find_best(whole(llama), 0.5)
    drawn = [
        one for seed in range(4) for one in cases.judge(noise(plain(llama), seed), "pooled", 0.5)
    ]
    mean_best, mean_drawn = (
        sum(each.error for each in found) / len(found) for found in (best, drawn)
    )
    assert mean_best < mean_drawn
    overlap = sum(each.overlap for each in drawn) / len(drawn)
    assert overlap == pytest.approx(0.5, abs=0.15)  # 16 draws of 8 of 16 channels, twice: sd 0.02


def test_rows_hold_every_score_and_sparsity(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_rows, "SPARSITIES", (0.5,))
    monkeypatch.setattr(quality_rows, "DRAWS", 1)
    estimator = slx.SVDEstimator.build(llama, 4, calibration=batches(), progress=False)
    known = {"svd": slx.SVDEstimator.build(llama, 4, progress=False), "calibrated": estimator}
    rows = quality_rows.attention_rows("demo_model", llama, batches(1), known)
    wanted = {
        (kind, score) for kind, scores in quality_rows.ATTENTION_SCORES.items() for score in scores
    }
    assert {(row["estimator"], row["score"]) for row in rows} == wanted | {
        ("oracle", None), ("random", None),
    }  # fmt: skip
    for row in rows:
        assert tuple(row) == quality_rows.KEYS and row["region"] == "attention"
        assert 0 <= row["overlap"] <= 1 and row["error"] > 0
    assert {row["region"] for row in quality_rows.gaps(rows)} == {"attention"}


def test_other_models_are_refused(llama: LlamaForCausalLM) -> None:
    assert is_llama(llama)
    small = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8)  # fmt: skip
    assert not is_llama(BertModel(small))
