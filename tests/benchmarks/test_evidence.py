"""The evidence benchmark: its statistics, its tasks and its protocol, on a tiny random model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.demo.models import MODEL
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import instructions, programs
from benchmarks.evidence.arms import ARMS, DENSE, UNTRAINED, Arm
from benchmarks.evidence.equivalence import paired_tost, t_quantile
from benchmarks.evidence.items import SPLITS, multiple_choice
from benchmarks.evidence.model import Base, load
from benchmarks.evidence.plots import plot
from benchmarks.evidence.results import FACE, open_results, table, tost
from benchmarks.evidence.tasks import TASKS, Encoded, collate, encoded
from benchmarks.evidence.training import Settings, Trained, judge, train
from sparselora_fx.plan.plan import SparsityPlan

TINY = Settings(steps=4, batch=4, tests=12, rates=(1e-3,), lora_rank=4, dtype="float32",
                backend="eager", model="tiny")  # fmt: skip


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 6.313752), (2, 2.919986), (3, 2.353363), (4, 2.131847), (9, 1.833113), (30, 1.697261)],
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(value, abs=2e-6)


def test_tost_by_hand() -> None:
    """Differences 0.2, -0.1, 0.3, 0.0, 0.1: mean 0.1, standard deviation sqrt(0.025)."""
    dense = [50.0, 61.0, 47.0, 55.0, 52.0]
    sparse = [50.2, 60.9, 47.3, 55.0, 52.1]
    found = paired_tost(sparse, dense, 1.0)
    half = 2.131847 * 0.025**0.5 / 5**0.5
    assert (found.low, found.high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert found.equivalent and not paired_tost(sparse, dense, 0.2).equivalent
    # The same differences in other pairs: pairing is what makes the interval narrow.
    assert not paired_tost(sparse, dense[::-1], 1.0).equivalent
    assert not paired_tost(sparse[:4], dense[:4], 9.0).equivalent  # too few for a verdict
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_tost(sparse, dense[:4], 1.0)


def test_tost_of_runs_pairs_seeds() -> None:
    scores = {DENSE: [50.0, 52.0, 54.0], "svd": [49.0, 51.5, 53.0]}
    runs = [
        {"task": "code", "arm": arm, "seed": seed, "score": score}
        for arm, values in scores.items()
        for seed, score in enumerate(values)
    ]
    random.Random(0).shuffle(runs)
    runs.append({"task": "code", "arm": "svd", "seed": 7, "score": 0.0})  # dense has no such seed
    (row,) = tost(runs)
    expected = paired_tost(scores["svd"], scores[DENSE], 1.0)
    assert row["n"] == 3 and row["low"] == round(expected.low, 3) and not row["equivalent"]


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", ["arithmetic", "code", "instructions"])
def test_splits_share_nothing(name: str) -> None:
    found = {split: TASKS[name].items(split, 200, 0) for split in SPLITS}
    prompts = [{item.prompt for item in items} for items in found.values()]
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]
    assert found["test"] == TASKS[name].items("test", 200, 0) != TASKS[name].items("test", 200, 1)
    with pytest.raises(ValueError, match="unknown split"):
        TASKS[name].items("pretrain", 1, 0)


def test_programs_print_what_is_said() -> None:
    for item in programs.items("test", 40, 0):
        program = item.prompt.removeprefix("Program:\n").removesuffix("\nOutput:\n")
        assert programs.printed(program) == item.answer != ""


def test_instruction_words_and_wordings_are_of_one_split() -> None:
    words = [set(instructions.WORDS[split]) for split in SPLITS]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]
    for table_ in (instructions.TAKE, instructions.ORDER, instructions.CASE):
        texts = [text for split in SPLITS for text in table_[split].values()]
        assert len(set(texts)) == len(texts)


def test_checkers_accept_the_answer_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(200):
        request = instructions.request_of("train", rng)
        answer = request.answer()
        assert instructions.broken(request, " " + answer) == []
        other = {"upper": "lower", "lower": "title", "title": "upper"}[request.case]
        assert "case" in instructions.broken(request, replace(request, case=other).answer())
        if len(set(request.kept())) > 1:
            turned = request.between.join(answer.split(request.between)[::-1])
            assert "order" in instructions.broken(request, turned)
        assert "between" in instructions.broken(request, answer.replace(request.between, " "))
        assert "take" in instructions.broken(request, answer + request.between + "More")


def test_options_hold_the_answer_and_begin_differently() -> None:
    pairs = [(f"text {i}", f"{chr(97 + i)}{chr(97 + i // 2)}word") for i in range(20)]
    items = multiple_choice(pairs, "test", 20, 0, "{text}: {options}")
    assert len({item.prompt for item in items}) == 20
    places = {item.options.index(item.answer) for item in items}
    assert len(places) == 4  # the answer is not always at one place
    assert all(len({option[:2] for option in item.options}) == 4 for item in items)


# ---------------------------------------------------------------- the protocol, on a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four blocks beside the shipped tokenizer."""
    home = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(home)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home)
    return home


@pytest.fixture
def base(folder: Path) -> Iterator[Base]:
    yield load(folder, torch.float32, "cpu")
    torch.compiler.reset()


def items_of(base: Base, count: int = 16) -> list[Encoded]:
    return encoded(TASKS["arithmetic"], "train", count, 0, base.tokenizer)


def test_dense_is_plain_peft(base: Base) -> None:
    """The dense arm's losses are those of a loop without the compiler."""
    trained = train(base, ARMS[DENSE], None, items_of(base), TINY, seed=3, rate=1e-3)
    assert trained.flops_share == 1.0
    base.bare(trained.model)
    model = base.adapted(3, TINY.lora_rank).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
    losses = []
    for n, rate in enumerate((0.0, 1e-3, 0.75e-3, 0.25e-3)):  # warm-up of one step, then a cosine
        optimizer.param_groups[0].update(lr=rate, weight_decay=0.0)
        loss = model(**collate(items_of(base)[4 * n : 4 * n + 4], 0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert trained.losses == pytest.approx(losses, abs=2e-4)


def test_flops_are_counted_alike_compiled_and_eager(base: Base) -> None:
    """Three quarters of 64 x 256 x 3 of one block of four; step 0 is dense."""
    plan = SparsityPlan({"layers.2.mlp": 0.75}, start_step=1)
    plain = command.plain_estimator(base, TINY)
    shares, losses = {}, {}
    for eager in (None, "exact", "cut"):
        arm = Arm("", lambda layers: plan, "svd", eager)
        trained = train(base, arm, plain, items_of(base), TINY, seed=0, rate=1e-3)
        base.bare(trained.model)
        shares[eager], losses[eager] = trained.flops_share, trained.losses
    ffn, attention = 3 * 64 * 256, 2 * 64 * 64 + 2 * 64 * 32
    skipped = 0.0
    for n in (1, 2, 3):
        batch = collate(items_of(base)[4 * n : 4 * n + 4], 0)
        learned = int((batch["labels"] != -100).sum()) / int(batch["attention_mask"].sum())
        skipped += (1 - learned) * 0.75 * ffn / (4 * (ffn + attention))
    assert shares[None] == pytest.approx(1 - skipped / 4, abs=1e-4)
    assert shares["exact"] == shares["cut"] == shares[None]
    assert losses[None][0] == pytest.approx(losses["exact"][0], abs=2e-4)  # the dense step


def test_a_right_answer_is_what_greedy_decoding_writes(base: Base) -> None:
    """Answers made by `generate` score 100; the same with another token in them score nothing."""
    model, right, wrong = base.model.eval(), [], []
    for item in items_of(base, 6):
        prompt = torch.tensor([item.prompt])
        out = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        answer = out[0, prompt.shape[1] :].tolist()
        right.append(Encoded(item.prompt, answer, ()))
        other = (answer[2] + 1) % model.config.vocab_size
        wrong.append(Encoded(item.prompt, [*answer[:2], other, answer[3]], ()))
    assert judge(model, base, right)[0] == 100.0
    assert judge(model, base, wrong)[0] == 0.0
    assert judge(model, base, right + wrong)[0] == 50.0


def test_an_option_wins_by_its_first_token(base: Base) -> None:
    (item,) = items_of(base, 1)
    logits = base.model.eval()(torch.tensor([item.prompt])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    assert judge(base.model, base, [Encoded(item.prompt, [best, 1], (best, worst))])[0] == 100.0
    assert judge(base.model, base, [Encoded(item.prompt, [worst, 1], (worst, best))])[0] == 0.0


def bench(base: Base, path: Path, settings: Settings = TINY) -> command.Bench:
    return command.Bench(base, settings, open_results(path, settings, {"device": "test"}))


@pytest.mark.slow
def test_stops_and_goes_on(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that dies leaves the finished ones in the file, and only the others are done then."""
    path, done = tmp_path / "evidence.json", []
    arms = [DENSE, "wide90", "wide-random"]

    def dies(*args: Any, **kwargs: Any) -> Any:
        done.append(args[1])
        if len(done) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(command, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        command.complete(bench(base, path), ["arithmetic"], arms, 1)
    first = json.loads(path.read_text())["runs"]
    assert [row["arm"] for row in first] == [UNTRAINED, DENSE]
    command.complete(bench(base, path), ["arithmetic"], arms, 1)
    assert len(done) == 4  # one that died, and the two that were missing
    body = json.loads(path.read_text())
    assert body["runs"][:2] == first
    assert [tuple(row) for row in body["runs"]] == [FACE] * 4
    assert all(0 < row["flops_share"] < 1 for row in body["runs"][2:])
    assert len(body["curves"]["arithmetic/wide90/0"]) == TINY.steps
    command.complete(bench(base, path), ["arithmetic"], arms, 1)
    assert len(done) == 4
    assert "wide-random" in table(open_results(path, TINY, {}))
    plot(open_results(path, None, {}), tmp_path / "evidence.png")
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="use the same settings"):
        open_results(path, replace(TINY, steps=5), {})


def test_rates_are_tuned_on_the_validation_split(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses by rate and split are given here: the validation split decides, the test split would
    decide otherwise."""
    settings = replace(TINY, rates=(1e-4, 1e-3, 3e-3))
    losses = {"validation": {1e-4: 0.5, 1e-3: 0.2, 3e-3: 0.4}, "test": {1e-4: 0.1, 1e-3: 0.9}}
    held = encoded(TASKS["arithmetic"], "validation", settings.tests, 0, base.tokenizer)
    trained: list[tuple[int, float]] = []

    def fake_train(*args: Any, seed: int, rate: float) -> Trained:
        trained.append((seed, rate))
        return Trained(base.adapted(seed, 4))

    def fake_judge(model: Any, base: Base, items: list[Encoded]) -> tuple[float, float]:
        return 0.0, losses["validation" if items == held else "test"][trained[-1][1]]

    monkeypatch.setattr(command, "train", fake_train)
    monkeypatch.setattr(command, "judge", fake_judge)
    found = bench(base, tmp_path / "tuned.json", settings)
    found.run("arithmetic", DENSE, 0)
    found.run("arithmetic", DENSE, 1)
    tuning = [(command.TUNING_SEED, rate) for rate in settings.rates]
    assert trained == [*tuning, (0, 1e-3), (1, 1e-3)]
    again = open_results(tmp_path / "tuned.json", settings, {})
    assert again.tried("arithmetic", DENSE) == losses["validation"]
    assert [run["lr"] for run in again.runs] == [1e-3, 1e-3]
    assert [run["loss"] for run in again.runs] == [0.9, 0.9]


@pytest.mark.parametrize(
    "name", ["evidence.json", "evidence_160_steps.json", "evidence_500_steps.json"]
)
def test_committed_results_are_of_the_form(name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / name
    body = json.loads(path.read_text(encoding="utf-8"))
    assert all(tuple(row) == FACE for row in body["runs"])
    assert {row["arm"] for row in body["runs"]} <= {*ARMS, UNTRAINED}
    assert {row["task"] for row in body["runs"]} <= set(TASKS)
    assert body["tost"] == tost(body["runs"])
