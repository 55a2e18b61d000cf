"""The shipped model: small, of the stated shape, able to calculate, with channels that matter."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.demo import batches as run
from benchmarks.demo import pretrain
from benchmarks.demo.word_problems import generate

FOLDER = pretrain.HERE / "model"
BUDGET_BYTES = 10_000_000


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_fits_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= BUDGET_BYTES


def test_it_is_a_llama_with_shared_kv_heads(model: LlamaForCausalLM) -> None:
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.intermediate_size >= 4 * config.hidden_size
    assert config.tie_word_embeddings
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_small_numbers_are_single_tokens(tokenizer) -> None:
    assert all(
        len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) == 1 for n in range(100)
    )


def test_text_survives_the_tokenizer(tokenizer) -> None:
    text = "Return a list of 12 names; raise ValueError if path is empty.\n\n    héllo → 123"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_record_says_how_it_was_made() -> None:
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["steps"] > 0 and 0 < record["loss"] < 4
    assert {"python", "torch", "transformers"} <= set(record["versions"])


@torch.no_grad()
def test_it_calculates(model: LlamaForCausalLM, tokenizer) -> None:
    """Far above chance: a guess among the results is right in about 3 of 100 equations."""
    rng = random.Random(11)
    right = 0
    for _ in range(100):
        given, wanted = pretrain.equation(rng)
        ids = tokenizer(given, return_tensors="pt", add_special_tokens=False)["input_ids"]
        reply = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
        right += reply.strip() == wanted.strip()
    assert right >= 50


@torch.no_grad()
def feed_forward_norms(model: LlamaForCausalLM, tokenizer, seed: int) -> list[torch.Tensor]:
    """Per layer, the norm over tokens of each feed-forward activation channel: (1024,)."""
    norms: list[torch.Tensor] = []

    def keep(_module, args: tuple[torch.Tensor]) -> None:
        norms.append(args[0].flatten(0, 1).norm(dim=0))

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    text = " ".join(p["instruction"] for p in generate("test", 16, seed))
    model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    for hook in hooks:
        hook.remove()
    return norms


def test_few_channels_carry_most_of_the_energy(model: LlamaForCausalLM, tokenizer) -> None:
    """The top tenth of the channels holds several times its share."""
    for norms in feed_forward_norms(model, tokenizer, seed=5):
        energy = norms.square().sort(descending=True).values
        assert energy[: len(energy) // 10].sum() / energy.sum() > 0.2


def test_which_channels_matter_depends_on_the_input(model: LlamaForCausalLM, tokenizer) -> None:
    first, second = (feed_forward_norms(model, tokenizer, seed) for seed in (5, 6))
    tops = [
        (set(a.topk(102).indices.tolist()), set(b.topk(102).indices.tolist()))
        for a, b in zip(first, second, strict=True)
    ]
    assert any(a != b for a, b in tops)


def test_pretraining_rows_have_the_stated_shape(tokenizer) -> None:
    texts = ["Return the sum of the values in the list, which must not be empty. " * 3]
    rows = pretrain.Rows(tokenizer, texts, random.Random(0))
    ids, labels = next(rows.batches())
    assert ids.shape == labels.shape == (pretrain.BATCH, pretrain.LENGTH)
    assert ((labels == ids) | (labels == -100)).all() and (labels != -100).any()


@pytest.mark.slow
def test_pretraining_texts_are_found_here() -> None:
    texts = pretrain.standard_library_docstrings()
    assert len(texts) > 1000 and len(set(texts)) == len(texts)


def test_pretraining_runs_and_resumes(tmp_path, monkeypatch) -> None:
    """Two short runs: the second continues the first one's steps and leaves a loadable folder."""
    monkeypatch.setattr(pretrain, "standard_library_docstrings", lambda: ["a b c d " * 40] * 30)
    steps, seconds = [], 1.0
    for _ in range(2):
        pretrain.main(
            [
                "--minutes",
                str(seconds / 60),
                "--no-compile",
                "--out",
                str(tmp_path / "model"),
                "--state",
                str(tmp_path / "state.pt"),
            ]
        )
        record = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
        steps.append(record["steps"])
        taken = torch.load(tmp_path / "state.pt", weights_only=False)["elapsed"]
        seconds = taken + 1.0  # however slow the machine was, the second run has a second
    assert 0 < steps[0] < steps[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_demo_batches_are_padded_to_a_bucket_and_teach_only_the_answer(tokenizer) -> None:
    problems = generate("train", 8)
    batch = run.collate([run.encode(p, tokenizer) for p in problems], tokenizer.pad_token_id)
    assert {tuple(x.shape) for x in batch.values()} == {(8, run.BUCKETS[0])}
    for row, problem in enumerate(problems):
        real = batch["attention_mask"][row].bool()
        learned = batch["labels"][row] != -100
        assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()
        assert not (learned & ~real).any()
        answer = tokenizer.decode(batch["input_ids"][row][learned])
        assert answer == f" {problem['output']}{tokenizer.eos_token}"


def test_demo_loss_ignores_padding(model: LlamaForCausalLM, tokenizer) -> None:
    """The same problems, padded further, have the same loss."""
    examples = [run.encode(p, tokenizer) for p in generate("test", 4)]
    narrow = run.collate(examples, tokenizer.pad_token_id)
    wide = {
        key: torch.nn.functional.pad(value, (0, 16), value=-100 if key == "labels" else 0)
        for key, value in narrow.items()
    }
    with torch.no_grad():
        losses = [model(**batch).loss for batch in (narrow, wide)]
    torch.testing.assert_close(losses[0], losses[1])
