"""Pretrains the shipped demo model: a small Llama (GQA, SwiGLU) on text that every machine has.

The text is the docstrings of the Python standard library; generated equations and word problems
(templates of the `pretrain` split, never those of `train` or `test`) teach it to calculate.

    python -m benchmarks.demo.pretrain --minutes 30

The files of the folder `--out` are replaced every few minutes, each in one step, so that the model
can be used at any time; `--state` lets an interrupted run continue where it was.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import platform
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.word_problems import generate, operands

HERE = Path(__file__).resolve().parent
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
VOCABULARY, LENGTH, BATCH = 2048, 128, 8  # tokens known, tokens per row, rows per step
MIXTURE = {"text": 0.3, "equations": 0.3, "problems": 0.4}  # share of rows
PEAK_RATE, WARMUP_STEPS = 2e-3, 100


def standard_library_docstrings() -> list[str]:
    """Every docstring of 80 characters or more in the standard library's sources, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    found[text] = None
    return list(found)


def equation(rng: random.Random) -> tuple[str, str]:
    """One equation as (what is given, what has to be found), in symbols or in words."""
    op = rng.choice("+-*/")
    a, b, result = operands(op, rng)
    if rng.random() < 0.75:
        return f" {a} {op} {b} =", f" {result}\n"
    return f" {a} {WORDS[op]} {b} is", f" {result}\n"


def train_tokenizer(texts: list[str], rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a number below 100, with the space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    numbers = pre_tokenizers.Split(Regex(r" ?\d{1,2}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [numbers, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counting = [" ".join(str(n) for n in range(100))] * 3000
    problems = [p["instruction"] + " " + p["output"] for p in generate("pretrain", 10000)]
    sample = rng.sample(texts, len(texts))
    tokenizer.train_from_iterator([*sample, *counting, *problems], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: 192 wide, feed-forward 1024 wide, 5 layers, 8 query and 2 kv heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass
class Rows:
    """Endless packed rows of token ids and labels, each of shape (LENGTH,), drawn from the mixture.

    Labels equal the ids, but -100 on what is drawn at random and cannot be predicted: the left side
    of an equation and half of the word problems' questions.
    """

    tokenizer: PreTrainedTokenizerFast
    texts: list[str]
    rng: random.Random
    left_over: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def document(self, kind: str) -> tuple[list[int], list[int]]:
        """One document of a kind: token ids and labels of equal length."""
        eos = [self.tokenizer.eos_token_id]
        if kind == "text":
            ids = self.encode(self.rng.choice(self.texts)) + eos
            return ids, list(ids)
        if kind == "equations":
            given, wanted = (self.encode(part) for part in equation(self.rng))
            return given + wanted, [-100] * len(given) + wanted
        problem = generate("pretrain", 4, self.rng.getrandbits(40))[self.rng.randrange(4)]
        given = self.encode(f"Question: {problem['instruction']}\nAnswer:")
        wanted = self.encode(f" {problem['output']}") + eos
        read = given if self.rng.random() < 0.5 else [-100] * len(given)
        return given + wanted, read + wanted

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self) -> tuple[list[int], list[int]]:
        """The next row of one kind; what is cut off starts the next row of that kind."""
        kind = self.rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        ids, labels = self.left_over.get(kind, ([], []))
        while len(ids) < LENGTH:
            more_ids, more_labels = self.document(kind)
            ids, labels = ids + more_ids, labels + more_labels
        self.left_over[kind] = (ids[LENGTH:], labels[LENGTH:])
        return ids[:LENGTH], labels[:LENGTH]

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of shape (BATCH, LENGTH), without end."""
        while True:
            ids, labels = zip(*(self.row() for _ in range(BATCH)), strict=True)
            yield torch.tensor(ids), torch.tensor(labels)


def save_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path,
                record: dict[str, object]) -> None:  # fmt: skip
    """Writes the bf16 weights, tokenizer and `training.json` beside `out`, then swaps them in."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        os.replace(path, out / path.name)
    fresh.rmdir()


def save_state(path: Path, **state: object) -> None:
    """Stores what a later run needs to continue, in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def rate(step: int, share: float) -> float:
    """Learning rate at a step, when `share` (0 to 1) of the time budget is gone."""
    decay = 1.0 if share < 0.3 else max(0.02, (1.0 - share) / 0.7)
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def summary(
    args: argparse.Namespace, step: int, losses: list[float], elapsed: float
) -> dict[str, object]:
    """What `training.json` says about the weights beside it; loss in nats per predicted token."""
    recent = losses[-100:]
    return {
        "seed": args.seed,
        "steps": step,
        "tokens": step * BATCH * LENGTH,
        "minutes": round(elapsed / 60, 1),
        "finished": elapsed >= args.minutes * 60,
        "loss": round(sum(recent) / len(recent), 4),
        "loss_is": "mean of the last 100 steps, nats per predicted token, mixture as trained",
        "mixture": MIXTURE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def train(args: argparse.Namespace) -> None:
    """Runs until the time budget is spent, saving on the way."""
    torch.manual_seed(args.seed)
    texts = standard_library_docstrings()
    print(f"{len(texts)} docstrings, {sum(map(len, texts)) / 1e6:.1f} M characters")
    old = torch.load(args.state, weights_only=False) if args.state.exists() else None
    tokenizer = old["tokenizer"] if old else train_tokenizer(texts, random.Random(args.seed))
    model = new_model(tokenizer)
    optimizer = make_optimizer(model)
    step, elapsed, losses = 0, 0.0, []
    if old:
        model.load_state_dict(old["model"])
        optimizer.load_state_dict(old["optimizer"])
        step, elapsed, losses = old["step"], old["elapsed"], old["losses"]
    forward = torch.compile(model.forward) if args.compile else model.forward
    batches = Rows(tokenizer, texts, random.Random(f"{args.seed}-{step}")).batches()
    budget, saved, before = args.minutes * 60, elapsed, time.monotonic() - elapsed
    bar = tqdm(total=round(budget), initial=round(elapsed), unit="s", mininterval=5)
    while elapsed < budget:
        ids, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, elapsed / budget)
        loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step, elapsed = step + 1, time.monotonic() - before
        bar.set_postfix(
            step=step, loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False
        )
        bar.update(round(elapsed) - bar.n)
        if elapsed - saved > args.save_minutes * 60 or elapsed >= budget:
            saved = elapsed
            save_folder(model, tokenizer, args.out, summary(args, step, losses, elapsed))
            save_state(args.state, model=model.state_dict(), optimizer=optimizer.state_dict(),
                       step=step, elapsed=elapsed, losses=losses, tokenizer=tokenizer)  # fmt: skip
    bar.close()
    print(json.dumps(summary(args, step, losses, elapsed), indent=1))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="training time in all")
    parser.add_argument("--save-minutes", type=float, default=5, help="time between saves")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--state", type=Path, default=HERE.parent / "out" / "pretrain_state.pt")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
