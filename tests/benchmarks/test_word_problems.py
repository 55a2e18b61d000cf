"""The generator of word problems: true answers, disjoint splits, the usual form."""

import json
import re
import sys

import pytest

from benchmarks.demo import word_problems
from benchmarks.demo.word_problems import (
    SPLITS,
    TEMPLATES,
    extract_answer,
    generate,
    prompt_of,
    templates,
)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true_and_small(split: str) -> None:
    for problem in generate(split, 400, seed=3):
        a, op, b, result = re.match(
            r"(\d+) (.) (\d+) = (\d+)\. The answer is \4\.$", problem["output"]
        ).groups()
        assert eval(f"{a} {op} {b}") == int(result)
        assert 0 < int(result) < 100
        assert problem["answer"] == result == extract_answer(problem["output"])


@pytest.mark.parametrize("split", SPLITS)
def test_the_question_holds_both_numbers_and_no_open_slot(split: str) -> None:
    for problem in generate(split, 400, seed=4):
        assert not re.search(r"[{}]", problem["instruction"])
        asked = sorted(re.findall(r"\d+", problem["instruction"]))
        a, b = re.match(r"(\d+) . (\d+)", problem["output"]).groups()
        assert asked == sorted([a, b])


def test_splits_share_no_template() -> None:
    kinds = [set(templates(split)) for split in SPLITS]
    assert sum(map(len, kinds)) == len(set.union(*kinds)) == sum(map(len, TEMPLATES.values()))
    assert all({op for op, _ in kind} == set(TEMPLATES) for kind in kinds)


def test_no_test_wording_is_seen_in_training() -> None:
    """With the slots blanked, no test question equals one that training can produce."""

    def blank(template: str) -> str:
        return re.sub(r"\{\w+\}", "_", template)

    seen = {blank(t) for split in ("pretrain", "train") for _, t in templates(split)}
    assert not seen & {blank(t) for _, t in templates("test")}


def test_the_same_seed_gives_the_same_problems() -> None:
    assert generate("train", 50, seed=1) == generate("train", 50, seed=1)
    assert generate("train", 50, seed=1) != generate("train", 50, seed=2)


def test_operators_are_balanced() -> None:
    ops = [problem["output"].split()[1] for problem in generate("test", 80)]
    assert {op: ops.count(op) for op in ops} == dict.fromkeys("+-*/", 20)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="pretrain, train, test"):
        generate("validation", 1)


def test_prompt_carries_an_input_only_where_there_is_one() -> None:
    problem = generate("train", 1)[0]
    assert "### Input" not in prompt_of(problem)
    assert prompt_of({**problem, "input": "5 apples"}).endswith(
        "### Input:\n5 apples\n\n### Response:"
    )


@pytest.mark.parametrize(
    ("text", "answer"), [("7 + 5 = 12. The answer is 12.", "12"), ("none", ""), ("-3", "-3")]
)
def test_extract_answer_takes_the_last_number(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_command_line_writes_json(tmp_path, monkeypatch) -> None:
    out = tmp_path / "problems.json"
    monkeypatch.setattr(
        sys, "argv", ["word_problems", "--split", "test", "-n", "8", "--out", str(out)]
    )
    word_problems.main()
    problems = json.loads(out.read_text(encoding="utf-8"))
    assert problems == generate("test", 8)
    assert set(problems[0]) == {"instruction", "input", "output", "answer"}
