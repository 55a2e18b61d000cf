"""The YAML of the command line: what it takes, and errors that name line and key."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.support.published import LORA_RANK, MODELS, PLANS, RANK
from sparselora_fx.cli.config import ConfigError, DataSection, read_config, recipes
from sparselora_fx.cli.data import encode, read_records

ROOT = Path(__file__).resolve().parents[2]
QLORA = "llama-3-8b-math10k-qlora"
GOOD = """\
model: {path: m}
data:
  train: t.jsonl
train:
  steps: 4
  learning_rate: 3e-4
plan: 0.5
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Any:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return read_config(str(file), overrides)


def test_values_defaults_and_overrides(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD, "train.steps=9", "plan={mlp: 0.25}", "lora.targets=q_proj")
    assert (found.model.path, found.train.steps, found.train.learning_rate) == ("m", 9, 3e-4)
    assert found.plan.sparsity == {"mlp": 0.25} and found.lora.targets == "q_proj"
    assert found.train.batch_size == 8 and found.output == "out"
    assert read(tmp_path, GOOD + "output: x\n").output == "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("steps: 4", "step: 4"), r"run.yaml:5: train.step: unknown key; did you mean 'steps'"),
        (("steps: 4", "steps: many"), r"run.yaml:5: train.steps: must be a whole number, got"),
        (("steps: 4", "steps: -1"), r"run.yaml:5: train.steps: is -1; allowed: 0 or more"),
        (("steps: 4", "schedule: flat"), r"run.yaml:5: train.schedule: is 'flat'; allowed"),
        (("steps: 4", "steps: true"), r"run.yaml:5: train.steps: must be a whole number, got True"),
        (("steps: 4", "batch_size: 2\n  batch_size: 3"), r"run.yaml:6: batch_size: stands here"),
        (("  train: t.jsonl", "  max_length: 8"), r"run.yaml:2: data.train: is missing"),
        (("plan: 0.5", "plan: 1.5"), r"run.yaml:7: plan: .*1.5"),
        (("plan: 0.5", "plan: {sparsity: 0.5, toks: all}"), r"run.yaml:7: plan: unknown option"),
        (("plan: 0.5", "plans: 0.5"), r"run.yaml:7: plans: unknown key; did you mean 'plan'"),
        (("plan: 0.5", "watch: {mode: loud}"), r"run.yaml:7: watch.mode: is 'loud'; allowed: off"),
        (("plan: 0.5", "watch: {every: 0}"), r"run.yaml:7: watch.every: is 0; allowed: 1 or more"),
        (("plan: 0.5", "plan: [1"), r"run.yaml:\d: not YAML"),
        (("model: {path: m}", "model: m"), r"run.yaml:1: model: must be a mapping"),
        (("{path: m}", "{path: m, quantisation: x}"), r"run.yaml:1: model.quantisation: is 'x'"),
        (("model: {path: m}\n", ""), r"run.yaml: model.path: is missing"),
    ],
)  # fmt: skip
def test_mistakes_have_a_line_and_a_key(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, GOOD.replace(*change))


@pytest.mark.parametrize("override", ["train.steps", "steps=3", "train.stepz=3", "model=3"])
def test_overrides_are_checked(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        read(tmp_path, GOOD, override)
    with pytest.raises(ConfigError, match=r"train.steps: must be a whole number, got 'x'"):
        read(tmp_path, GOOD, "train.steps=x")


def test_the_page_shows_the_defaults_and_both_forms(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    required = "model: {path: my-model}\ndata: {train: train.jsonl}\n"
    assert read(tmp_path, shown) == read(tmp_path, required)
    (lines,) = re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    assert [sorted(r) for r in read_records(str(tmp_path / "t.jsonl"))] == [
        ["input", "instruction", "output"], ["messages"]
    ]  # fmt: skip


def test_an_unknown_name_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama-3-8b-math10k'"):
        read_config("llama3-8b-math10k")


def test_recipes_are_the_published_plans() -> None:
    names = {"Math10K": "math10k", "CSR": "csr170k", "Code": "codefeedback", "MT-Bench": "wizardlm"}
    published = {f"{p.model.lower()}-{names[p.task]}": p for p in PLANS if p.task in names}
    assert recipes() == sorted([*published, QLORA])
    for name, plan in published.items():
        found = read_config(name, ["model.path=m", "data.train=t.json"])
        keys = {
            key: value
            for i, (ffn, attention) in enumerate(plan.levels())
            for key, value in ((f"layers.{i}.mlp", ffn), (f"layers.{i}.self_attn", attention))
            if value
        }
        assert found.plan.sparsity == keys and found.plan.rank == RANK == found.estimator.rank
        assert found.lora.rank == LORA_RANK and found.lora.alpha == 2 * LORA_RANK
        assert int(MODELS[plan.model]["num_hidden_layers"]) > max(
            int(key.split(".")[1]) for key in keys
        )


def test_the_recipe_in_four_bits_is_the_published_one_otherwise() -> None:
    given = ["model.path=m", "data.train=t.json", "output=o"]
    plain, quantised = (read_config(name, given) for name in (QLORA.removesuffix("-qlora"), QLORA))
    assert quantised.model.quantisation == "nf4-double"
    assert replace(quantised, model=plain.model) == plain
    assert replace(quantised.model, quantisation="none") == plain.model


INSTRUCTION = {"instruction": "Add 2 and 3.", "input": "", "output": "5"}
CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
}


def test_files_and_forms(tmp_path: Path) -> None:
    whole, lines = tmp_path / "t.json", tmp_path / "t.jsonl"
    whole.write_text(json.dumps([INSTRUCTION, CHAT]), encoding="utf-8")
    lines.write_text(f"{json.dumps(INSTRUCTION)}\n\n{json.dumps(CHAT)}\n", encoding="utf-8")
    assert read_records(str(whole)) == read_records(str(lines)) == [INSTRUCTION, CHAT]
    tokenizer = AutoTokenizer.from_pretrained("benchmarks/demo/model")
    for template in (None, "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant\n{% endif %}"):  # fmt: skip
        tokenizer.chat_template = template
        single, chat = encode([INSTRUCTION, CHAT], tokenizer, DataSection("t"))
        for found, answers in ((single, ["5"]), (chat, ["Hello", "See you"])):
            learnt = [i for i, label in enumerate(found["labels"]) if label != -100]
            assert len(found["labels"]) == len(found["input_ids"])
            assert all(found["labels"][i] == found["input_ids"][i] for i in learnt)
            text = tokenizer.decode([found["labels"][i] for i in learnt])
            assert all(answer in text for answer in answers)
            prompt = tokenizer.decode(
                [t for t, label in zip(found["input_ids"], found["labels"], strict=True)
                 if label == -100]
            )  # fmt: skip
            assert not any(answer in prompt for answer in answers)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.txt", "", r"ends in .json, .jsonl, .parquet"),
        ("t.json", "{}", "expected a list"),
        ("t.json", "[]", "holds no record"),
        ("t.json", '[{"instruction": "a"}]', "record 1: 'output' is None; expected the"),
        ("t.jsonl", '{"instruction": "a", "output": "b"}\n{', r"t.jsonl:2: not JSON"),
        ("t.json", '[{"messages": [{"role": "user", "content": "a"}]}]', "nothing would be learnt"),
        ("t.json", '[{"messages": [{"role": "bot", "content": "a"}]}]', "has the role 'bot'"),
    ],
)  # fmt: skip
def test_bad_data_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        read_records(str(tmp_path / name))
    with pytest.raises(ConfigError, match="cannot read"):
        read_records(str(tmp_path / "missing.json"))


def test_parquet_where_it_can_be_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for record in (INSTRUCTION, CHAT):
        parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "t.parquet")
        assert read_records(str(tmp_path / "t.parquet")) == [record]
    (tmp_path / "t.parquet").write_text("no table", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"t.parquet: not Parquet"):
        read_records(str(tmp_path / "t.parquet"))


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"t.parquet: parquet files need pyarrow \(pip install"):
        read_records(str(tmp_path / "t.parquet"))


def test_prompts_that_do_not_fit() -> None:
    tokenizer = AutoTokenizer.from_pretrained("benchmarks/demo/model")
    with pytest.raises(ConfigError, match=r"data.prompt is '{question}'"):
        encode([INSTRUCTION], tokenizer, DataSection("t", prompt="{question}"))
    with pytest.raises(ConfigError, match="max_length=2"):
        encode([INSTRUCTION], tokenizer, DataSection("t", max_length=2))
