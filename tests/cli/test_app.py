"""The command line end to end, on a tiny model with made-up data."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks.demo.word_problems import generate
from sparselora_fx.cli import doctor
from sparselora_fx.cli.app import app
from sparselora_fx.cli.config import recipes

TOKENIZER = "benchmarks/demo/model"


def save_model(folder: Path, layers: int, width: int = 32) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a configuration."""
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "model", 2)
    records = [
        {"instruction": p["instruction"], "output": str(p["output"])} for p in generate("train", 12)
    ]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (root / "run.yaml").write_text(
        f"model: {{path: {root / 'model'}, dtype: float32}}\n"
        f"data: {{train: {root / 'train.jsonl'}}}\n"
        "plan: {sparsity: {layers.1.mlp: 0.5}, start_step: 1}\n"
        "lora: {rank: 4}\nestimator: {rank: 4}\ncompile: {backend: eager}\n"
        "watch: {mode: observe, every: 1}\n"
        "train: {steps: 2, batch_size: 2, save_steps: 2, logging_steps: 1}\n"
        f"output: {root / 'out'}\n",
        encoding="utf-8",
    )
    return root


def run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


@pytest.mark.slow
def test_train_then_resume(folder: Path) -> None:
    """Two steps, an adapter that PEFT loads; two more from the checkpoint, which moves it on."""
    first = json.loads(run("train", folder / "run.yaml", "--json").stdout)
    assert first["steps"] == 2 and first["resumed_from"] is None
    file = folder / "out" / "adapter" / "adapter_model.safetensors"
    before = load_file(file)
    assert any(bool(value.abs().sum()) for name, value in before.items() if "lora_B" in name)
    again = run(
        "train", folder / "run.yaml", "--resume", "--set", "train.steps=4", "--json"
    )  # fmt: skip
    costs = json.loads(again.stdout)
    assert costs["steps"] == 4 and costs["resumed_from"] == "checkpoint-2"
    assert 0 < costs["worth"]["sparse_tokens"] < 1
    assert costs["worth"]["sparse_flops"] < costs["worth"]["dense_flops"]
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert costs["verdict"] in html.unescape(page) and "FLOPs of a step" in page
    assert 'id="drift"' in page and costs["cost"]["parts"]["watch_seconds_per_step"] > 0
    assert costs["cost"]["predicted_ratio"] == costs["worth"]["predicted_ratio"]
    after = load_file(file)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    PeftModel.from_pretrained(base, folder / "out" / "adapter")
    said = json.loads((folder / "out" / "explain.json").read_text(encoding="utf-8"))
    assert [r["names"] for r in said["regions"]] == [["layers.1.mlp"]]
    assert "layers.1.mlp" in (folder / "out" / "explain.txt").read_text(encoding="utf-8")
    assert json.loads((folder / "out" / "costs.json").read_text(encoding="utf-8")) == costs


def test_estimate_and_explain(folder: Path) -> None:
    out = folder / "estimator.safetensors"
    found = json.loads(run("estimate", folder / "run.yaml", "--out", out, "--json").stdout)
    assert found == {"file": str(out), "weights": 14, "calibrated": False}
    given = ("--set", f"estimator.file={out}")
    said = run("explain", folder / "run.yaml", *given).stdout
    assert "3 of 14 frozen linears rewritten; 1 graphs traced" in said and "layers.1.mlp" in said
    page = folder / "report.html"
    assert json.loads(
        run("report", folder / "run.yaml", "--out", page, *given, "--json").stdout
    ) == {"file": str(page)}
    assert "layers.1.mlp" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_explain_for_programs(folder: Path) -> None:
    data = json.loads(run("explain", folder / "run.yaml", "--json").stdout)
    assert sum(row["sliced"] for row in data["linears"]) == 3


@pytest.mark.slow
def test_sensitivity_and_bench(folder: Path) -> None:
    found = json.loads(
        run("sensitivity", folder / "run.yaml", "--batches", 1, "--level", 0.5, "--json").stdout
    )
    assert {row["kind"] for row in found["rows"]} == {"ffn", "attention"}
    times = json.loads(run("bench", folder / "run.yaml", "--pairs", 2, "--json").stdout)
    assert times["pairs"] == 2 and times["dense_ms"] > 0 and times["ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("--set", "train.stepz=3"), "expected section.key=value", 2),
        (("--set", "model.path=nowhere"), "model.path: 'nowhere' is no folder", 2),
        (("--set", "data.train=no.json"), "data.train: cannot read", 2),
        (("--resume", "--set", "output=nothing"), "holds no checkpoint", 2),
        (("--set", "plan={layers.7.mlp: 0.5}"), "matches no module of this model", 1),
        (("--set", "lora.targets=nothing"), "lora.targets: ", 2),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: Any, says: str, code: int) -> None:
    done = run("train", folder / "run.yaml", *arguments, code=code)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("sparselora-fx: error: ") and says in line and done.stdout == ""


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["versions"]["torch"] == torch.__version__ and "cpu" in found["runs"]
    monkeypatch.setenv("SPARSELORA_DISABLED_LAYERS", "nothing")
    done = run("doctor", code=1)
    assert "SPARSELORA_DISABLED_LAYERS names 'nothing'" in " ".join(done.stdout.split())
    monkeypatch.delenv("SPARSELORA_DISABLED_LAYERS")
    monkeypatch.setattr(doctor.torch, "__version__", "3.1.0")
    assert "torch 3.1.0 is not one" in " ".join(run("doctor", code=1).stdout.split())


def test_help_has_an_example_each() -> None:
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(commands) == 8
    for name in commands:
        assert f"Example: sparselora-fx {name}" in " ".join(run(name, "--help").stdout.split())
    assert set(json.loads(run("recipes", "--json").stdout)) == set(recipes())


def test_the_entry_point_says_what_it_lacks() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\nfrom sparselora_fx.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'sparselora_fx[cli]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    """On a tiny model of the recipe's depth, in its own precision."""
    quantised = name.endswith("qlora")  # in blocks of 64 elements
    save_model(tmp_path / "model", 40 if "13b" in name else 32, 64 if quantised else 32)
    records = [
        {"instruction": f"{p['instruction']} " * 8, "output": str(p["output"])}
        for p in generate("train", 4)
    ]
    (tmp_path / "t.json").write_text(json.dumps(records), encoding="utf-8")
    values = {
        "model.path": tmp_path / "model", "data.train": tmp_path / "t.json", "train.steps": 2,
        "train.batch_size": 2, "train.accumulation": 1, "train.save_steps": 0,
        "compile.backend": "eager", "compile.regional": "true", "output": tmp_path / "out",
    }  # fmt: skip
    given = [text for key, value in values.items() for text in ("--set", f"{key}={value}")]
    costs = json.loads(run("train", name, *given, "--json").stdout)
    said = json.loads((tmp_path / "out" / "explain.json").read_text(encoding="utf-8"))
    assert costs["steps"] == 2 and said["regions"]
    assert said["worth"]["graphs"] <= 12  # for 32 or 40 blocks, each compiled on its own
    unpacked = [row for row in said["linears"] if "bitsandbytes nf4 (double)" in str(row)]
    assert bool(unpacked) == quantised
