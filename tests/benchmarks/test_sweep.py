"""A sample of the sweep over transformers' architectures, and the page made from its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import architectures
from benchmarks.sweep import check_model, tiny_models
from benchmarks.sweep.architectures_page import page, ran, refused, summary, whole
from tests.support.slow import slow

# (task, model, attentions sliced, FFN linears sliced); -1: as many as there are.
FAST = [
    slow("causal-lm", "apertus", 2, 4),
    slow("causal-lm", "codegen", 2, 4),
    slow("causal-lm", "granite_swa", 2, 6),
    slow("causal-lm", "minicpm3", 2, 6),
    slow("seq2seq", "marian", 6, 8),
    ("image-classification", "vit", 2, 4),
]
# end_to_end/test_architectures.py has llama, gpt2, gpt_neox, falcon, phi3, gemma2, qwen3 and bert.
SLOW = [
    ("causal-lm", name, -1, -1)
    for name in (
        "gpt_neox_japanese", "bloom", "opt", "phi", "gemma3_text", "cohere2", "olmo2", "glm4",
        "starcoder2", "mpt", "gpt_oss", "mixtral", "qwen3_next", "deepseek_v3", "granitemoe",
    )
] + [
    ("masked-lm", "electra", -1, -1),
    ("sequence-classification", "roberta", -1, -1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No chatter of transformers about tiny sizes."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def _check(task: str, model: str, attentions: int, ffn: int) -> None:
    row = check_model.check(task, model, backend="eager", quick=True)
    assert row.get("right") is True, row
    done, total = row["attentions"]
    assert done == total and attentions in (-1, done), row["dense"]
    done, total = row["linears"].get("ffn", (0, 0))
    assert done == total and ffn in (-1, done), row["dense"]


@pytest.mark.parametrize(("task", "model", "attentions", "ffn"), FAST)
def test_sample(task: str, model: str, attentions: int, ffn: int) -> None:
    _check(task, model, attentions, ffn)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model", "attentions", "ffn"), SLOW)
def test_larger_sample(task: str, model: str, attentions: int, ffn: int) -> None:
    _check(task, model, attentions, ffn)


@pytest.mark.slow
def test_layers_that_run_again_in_backward_are_dense() -> None:
    """Reversible layers run without gradients, and again in the backward, outside compiled code."""
    row = check_model.check("masked-lm", "reformer", backend="eager", quick=True)
    assert row["right"] and row["zero"], row
    reasons = {reason for kind in row["dense"].values() for reason in kind}
    assert row["linears"]["ffn"][0] == 0
    assert all("without gradients inside a training step" in reason for reason in reasons)


# ---------------------------------------------------------------- the result file and its page


def _result() -> dict[str, Any]:
    return json.loads(architectures.RESULT.read_text())


def test_page_is_made_from_the_results() -> None:
    assert architectures.PAGE.read_text() == page(_result())


def test_every_architecture_has_a_row() -> None:
    rows = {(row["task"], row["model"]) for row in _result()["rows"]}
    missing = {
        (task, model) for task in tiny_models.TASKS for model in tiny_models.model_types(task)
    } - rows
    assert not missing


def test_no_row_is_wrong() -> None:
    rows = _result()["rows"]
    assert len(rows) > 400
    wrong = [(r["task"], r["model"]) for r in rows if r.get("right") is False]
    failed = [(r["task"], r["model"]) for r in rows if "sparse" in r and not refused(r)]
    assert not wrong and not failed
    assert not [r["model"] for r in rows if refused(r)]
    assert not [r["model"] for r in rows if r.get("zero") is False]


def test_causal_language_models_reach_the_target() -> None:
    rows = [row for row in _result()["rows"] if row["task"] == "causal-lm" and ran(row)]
    for kind, share in (("ffn", 0.95), ("attention", 0.90)):
        known = [whole(row, kind) for row in rows if whole(row, kind) is not None]
        assert len(known) > 150 and sum(known) >= share * len(known), kind


def test_counts_of_made_up_rows() -> None:
    good = {"linears": {"ffn": [4, 4]}, "attentions": [1, 2], "right": True, "zero": True}
    rows = [good, {"error": "no"}, {"plain": "RuntimeError"}, {"right": False, "linears": {}}]
    counts = summary(rows)
    assert counts["plain trains"] == 2 and counts["right"] == counts["wrong"] == 1
    assert counts["every FFN sliced"] == counts["with FFN linears"] == 1
    assert counts["every attention sliced"] == 0 and counts["with attention"] == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.attentions.1.q_lin", "attention"),
        ("convbert.encoder.layer.0.intermediate.dense", "ffn"),
        ("model.layers.3.mlp.experts.w1", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "ffn"),
        ("model.layers.3.mlp.gate", "other"),
        ("backbone.layers.0.mixer.in_proj", "state"),
        ("lm_head", "other"),
    ],
)
def test_kinds_of_linears(name: str, kind: str) -> None:
    assert check_model.kind_of(name, 48) == kind


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn"),
        ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention"),
        ("transformer.attentions.1.q_lin", "transformer.attentions.1"),
        ("layers.0.self_attn.1.kv_b_proj", "layers.0.self_attn.1"),
    ],
)
def test_attention_modules(name: str, module: str) -> None:
    assert check_model.attention_module(name) == module
