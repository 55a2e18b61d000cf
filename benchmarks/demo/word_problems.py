"""Arithmetic word problems in the JSON form of Math10K: instruction, input, output, answer.

Every problem is one step of +, -, * or / on whole numbers with a result below 100, told through a
hand-written template. The splits are disjoint *by template*: a model that only memorises
wordings scores nothing on `test`. `pretrain` is for the demo model's own pretraining.

    python -m benchmarks.demo.word_problems --split train -n 2000 --seed 0 --out train.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jack", "Kate", "Leo",
    "Maria", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "cards", "marbles", "pencils", "stickers", "cookies", "oranges",
    "shells", "stamps", "flowers", "eggs", "balls", "toys", "buttons",
)  # fmt: skip
BOXES = (
    ("boxes", "box"), ("bags", "bag"), ("baskets", "basket"), ("jars", "jar"),
    ("shelves", "shelf"), ("trays", "tray"), ("packs", "pack"), ("drawers", "drawer"),
)  # fmt: skip

ADD = """\
{name} has {a} {item} and finds {b} more. How many {item} does {name} have now?
{name} has {a} {item} and {other} has {b} {item}. How many {item} do they have in all?
{name} buys {a} {item} in the morning and {b} {item} in the evening. \
How many {item} did {name} buy in all?
There are {a} {item} on the table. {name} puts {b} more {item} there. How many {item} are there now?
{name} picked {a} {item} and {other} picked {b} {item}. How many {item} were picked together?
A {box} holds {a} {item}. {name} adds {b} more. How many {item} are in the {box} now?
{name} had {a} {item}. {other} gave {name} another {b} {item}. How many {item} does {name} have now?
On Monday {name} read {a} pages and on Tuesday {b} pages. How many pages did {name} read in total?
One {box} has {a} {item} and another {box} has {b} {item}. How many {item} are there in total?
{name} and {other} put {a} {item} and {b} {item} together. How many {item} do they have in all?
{name} collects {a} {item} and then gets {b} more. What is the total number of {item}?
A shop sold {a} {item} today and {b} {item} yesterday. How many {item} did the shop sell in all?
{name} starts with {a} {item} and buys {b} more. How many {item} does {name} have now?
{other} has {b} {item}. {name} has {a} {item}. Together, how many {item} do they have?
{name} found {a} {item} at home and {b} {item} at school. How many {item} did {name} find in total?
There were {a} {item} in the {box}. {other} put in {b} more. How many {item} are there in all?
{name} pays {a} dollars for {item} and {b} dollars for bread. How many dollars is that in total?
{name} made {a} {item}, and {other} made {b} more. How many {item} were made in all?
A class has {a} girls and {b} boys. How many children are in the class in total?
{name} owns {a} {item}. Then {other} adds {b} more {item}. How many {item} are there together?"""

SUBTRACT = """\
{name} has {a} {item} and loses {b} of them. How many {item} does {name} have left?
{name} had {a} {item} and gave {b} to {other}. How many {item} does {name} have left?
There are {a} {item} on the table. {name} takes {b} {item} away. How many {item} are left?
{name} has {a} {item} and {other} has {b}. How many more {item} does {name} have than {other}?
A {box} holds {a} {item}. {name} removes {b}. How many {item} are left in the {box}?
{name} baked {a} {item} and sold {b} of them. How many {item} remain?
There were {a} {item} in the {box}. {other} took {b} of them. How many {item} remain in the {box}?
{name} needs {a} {item} and already has {b}. How many more {item} does {name} need?
{name} has {a} dollars and spends {b} dollars. How many dollars are left?
A shop had {a} {item} and sold {b}. How many {item} are left in the shop?
{name} picked {a} {item}, but {b} were bad and thrown away. How many good {item} are left?
{name} has {a} {item}. {other} has {b}. How many fewer {item} does {other} have than {name}?
{name} gives {b} of {a} {item} to {other}. How many {item} remain?
{name} started with {a} {item} and used {b}. How many {item} does {name} still have?
Out of {a} {item}, {name} lost {b}. How many {item} does {name} have left?
{name} wants {a} {item} but has only {b}. How many more {item} does {name} need?
A book has {a} pages and {name} has read {b} of them. How many pages are left to read?
{name} kept {a} {item} in a {box} and {other} took {b} away. How many {item} remain?
There are {a} children on a bus and {b} of them get off. How many children are left on the bus?
{name} had {a} {item}, then sold {b} of them to {other}. How many {item} does {name} have left?"""

MULTIPLY = """\
There are {a} {boxes} with {b} {item} in each {box}. How many {item} are there in all?
{name} has {a} {boxes}. Each {box} holds {b} {item}. How many {item} does {name} have in all?
{name} buys {a} {boxes} of {b} {item} each. How many {item} did {name} buy?
Each of {a} friends brings {b} {item}. How many {item} do they bring in all?
{name} reads {b} pages every day for {a} days. How many pages does {name} read in total?
A {box} holds {b} {item}. How many {item} do {a} {boxes} hold?
{name} puts {b} {item} into each of {a} {boxes}. How many {item} are in the {boxes} in total?
There are {a} rows of {b} {item} each. How many {item} are there in total?
One ticket costs {b} dollars. How many dollars do {a} tickets cost?
{name} plants {a} rows with {b} {item} in each row. How many {item} does {name} plant?
Each {box} has {b} {item} and there are {a} {boxes}. What is the total number of {item}?
{name} earns {b} dollars every day. How many dollars does {name} earn in {a} days?
{a_cap} {boxes} hold {b} {item} each. How many {item} do they hold in all?
{name} gives {b} {item} to each of {a} friends. How many {item} did {name} give in total?
Each {box} holds {b} {item}. {name} has {a} {boxes}. How many {item} does {name} have in all?
{name} fills {a} {boxes} and puts {b} {item} in each one. How many {item} are there in total?
{name} makes {b} {item} every day. How many {item} does {name} make in {a} days?
A shop has {a} {boxes}, each with {b} {item}. How many {item} does the shop have in all?
There are {a} tables and each has {b} {item} on it. How many {item} are on the tables in total?
{name} and {other} fill {a} {boxes} with {b} {item} each. How many {item} do the {boxes} hold?"""

DIVIDE = """\
{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?
{a_cap} {item} are split equally into {b} {boxes}. How many {item} are in each {box}?
{name} puts {a} {item} equally into {b} {boxes}. How many {item} go in each {box}?
{name} has {a} {item} and packs {b} into each {box}. How many {boxes} does {name} fill?
A group of {b} children divides {a} {item} equally. How many {item} does each child get?
{name} divides {a} {item} into {b} equal groups. How many {item} are in each group?
{name} reads {a} pages in {b} days, the same number every day. How many pages is that per day?
{b_cap} tickets cost {a} dollars. How many dollars does each ticket cost?
There are {a} {item} to be split equally among {b} people. How many {item} does each person get?
{name} arranges {a} {item} in {b} equal rows. How many {item} are in each row?
{name} gives {a} {item} to {b} friends in equal shares. How many {item} does each friend get?
A shop packs {a} {item} in {boxes} of {b}. How many {boxes} does the shop fill?
{b_cap} {boxes} hold {a} {item}, the same number in each. How many {item} are in each {box}?
{name} earns {a} dollars in {b} days, the same every day. How many dollars is that per day?
{name} and {other} divide {a} {item} equally into {b} {boxes}. How many {item} does each {box} get?
A total of {a} {item} is shared equally by {b} children. How many {item} does each child get?
{name} splits {a} {item} into {b} equal groups. How many {item} does each group have?
{name} packs {a} {item} equally into {b} {boxes}. How many {item} are in each {box}?
{name} sets {a} {item} on {b} tables, the same number on each. How many {item} are on each table?
Each of {b} friends gets an equal share of {a} {item}. How many {item} does each friend get?"""

TEMPLATES: dict[str, list[str]] = {
    "+": ADD.splitlines(),
    "-": SUBTRACT.splitlines(),
    "*": MULTIPLY.splitlines(),
    "/": DIVIDE.splitlines(),
}
SPLIT_OF = ("pretrain", "train", "pretrain", "train", "test")  # by template index modulo 5
SPLITS = ("pretrain", "train", "test")


def operands(op: str, rng: random.Random) -> tuple[int, int, int]:
    """Draws (a, b, a op b); all three are whole numbers from 1 to 98."""
    if op == "+":
        a, b = rng.randint(2, 40), rng.randint(2, 40)
        return a, b, a + b
    if op == "-":
        a = rng.randint(5, 60)
        b = rng.randint(2, a - 1)
        return a, b, a - b
    x = rng.randint(2, 9)
    y = rng.randint(2, min(12, 98 // x))
    return (x, y, x * y) if op == "*" else (x * y, x, y)


def templates(split: str) -> list[tuple[str, str]]:
    """All (operator, template) pairs of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    return [
        (op, text)
        for op, texts in TEMPLATES.items()
        for i, text in enumerate(texts)
        if SPLIT_OF[i % 5] == split
    ]


def make_problem(op: str, template: str, rng: random.Random) -> dict[str, str]:
    """Fills one template with fresh names, things and numbers."""
    a, b, result = operands(op, rng)
    name, other = rng.sample(NAMES, 2)
    boxes, box = rng.choice(BOXES)
    question = template.format(a=a, b=b, a_cap=f"All {a}", b_cap=f"All {b}", name=name, other=other,
                               item=rng.choice(ITEMS), boxes=boxes, box=box)  # fmt: skip
    output = f"{a} {op} {b} = {result}. The answer is {result}."
    return {"instruction": question, "input": "", "output": output, "answer": str(result)}


def generate(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Makes `n` problems of a split ("pretrain", "train" or "test"); the seed decides them all.

    Operators are balanced: problem i uses operator i modulo 4, with any template of that operator.
    """
    rng = random.Random(f"{split}-{seed}")
    pool = templates(split)
    by_op = {op: [text for o, text in pool if o == op] for op in TEMPLATES}
    ops = list(TEMPLATES)
    return [make_problem(ops[i % 4], rng.choice(by_op[ops[i % 4]]), rng) for i in range(n)]


def prompt_of(problem: dict[str, str]) -> str:
    """The text that the model reads; its continuation is a space and the problem's `output`."""
    extra = f"\n\n### Input:\n{problem['input']}" if problem["input"] else ""
    return f"### Instruction:\n{problem['instruction']}{extra}\n\n### Response:"


def extract_answer(text: str) -> str:
    """The last whole number in a generated text, or "" where there is none."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def main() -> None:
    """Writes one split as a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("-n", type=int, default=2000, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    problems = generate(args.split, args.n, args.seed)
    args.out.write_text(json.dumps(problems, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {len(problems)} {args.split} problems to {args.out}")


if __name__ == "__main__":
    main()
