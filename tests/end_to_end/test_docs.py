"""Every code block of README and docs runs, page by page from top to bottom, or quotes our code.

README's blocks run as they stand. A page of docs/ speaks of `model` (compiled), `estimator`,
`batches`, `batch` and its tensors, and `tokenizer`, which are a tiny model's here, and of the
`path` of a saved one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sparselora_fx as slx
from sparselora_fx.runtime.speed_check import Verdict

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
QUOTES = {"docs/new_structure.md"}  # its blocks are parts of passes/ and tests/
NEEDS = {"docs/trl.md": "trl"}  # what a page asks for, and nothing else here does


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, m.start()) + 2, m[1]) for m in found]


def run(page: str, space: dict[str, Any]) -> None:
    for line, source in blocks(page):
        tree = ast.increment_lineno(ast.parse(source), line - 1)
        exec(compile(tree, str(ROOT / page), "exec"), space)


def given(path: Path) -> dict[str, Any]:
    """What the pages of docs/ speak of."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "benchmarks" / "demo" / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer),
    )  # fmt: skip
    wide = {"hidden_size": 64, "num_hidden_layers": 1}  # quantised in blocks of 64
    LlamaForCausalLM(LlamaConfig.from_dict({**config.to_dict(), **wide})).save_pretrained(path)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    ids = torch.randint(3, 64, (2, 16))
    labels = ids.clone()
    labels[:, :10] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    estimator = slx.SVDEstimator.build(model, rank=8, progress=False)
    slx.compile(model, estimator, plan=slx.SparsityPlan(0.5, start_step=0), backend="eager")
    completion, seen = labels != -100, batch["attention_mask"]
    return {
        "completion": completion, "ids": ids, "seen": seen,
        "slx": slx, "torch": torch, "model": model, "estimator": estimator, "batches": [batch],
        "batch": batch, "path": path, "tokenizer": tokenizer,
    }  # fmt: skip


def test_a_page_without_a_python_block_is_no_fault_of_the_test() -> None:
    assert {"README.md"} | QUOTES <= {page for page in ["README.md", *PAGES] if blocks(page)}


@pytest.mark.slow
def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, from a folder that looks like a checkout, so that nothing is left in ours."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    # Whether a sparse step is faster is the business of whoever runs it, not of a busy machine.
    monkeypatch.setattr(Verdict, "pays", True)
    space: dict[str, Any] = {}
    run("README.md", space)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    sparse = {name.removesuffix(".base_layer").rsplit(".", 1)[1] for name in space["rec"].sites}
    assert sparse == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in QUOTES and blocks(page)])
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    space = given(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    run(page, space)


def bare(function: ast.FunctionDef) -> str:
    """A function without annotations and docstring, as a page shows it."""
    for argument in function.args.posonlyargs + function.args.args + function.args.kwonlyargs:
        argument.annotation = None
    function.returns = None
    body = function.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body = body[1:]
    return ast.unparse(ast.FunctionDef(function.name, function.args, body, [], lineno=1))


@pytest.mark.parametrize("page", sorted(QUOTES))
def test_page_quotes_our_code(page: str) -> None:
    sources = [*ROOT.glob("passes/*.py"), *ROOT.glob("tests/**/*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {bare(node) for node in nodes if isinstance(node, ast.FunctionDef)}
    for line, source in blocks(page):
        for node in ast.parse(source).body:
            assert isinstance(node, ast.FunctionDef)
            assert bare(node) in ours, f"{page}:{line}: {node.name} does not read like this"
