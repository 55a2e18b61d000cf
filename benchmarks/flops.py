"""FLOPs of a sparse training step, as a share of dense LoRA's, for every published plan.

    python -m benchmarks.flops --json F [--details F] [--plan Llama-3-8B/Math10K ...]

Counted from the graphs that `sparselora_fx` rewrote, forward and backward, estimator included, on
meta tensors: no weight is allocated and nothing is executed. Every matmul and attention product
counts two FLOPs a multiply-add; pointwise work, gathers and the optimizer count nothing, on either
side. Attention counts in full, as if no causal mask saved half of it.

Depth: FLOPs of a decoder are a sum over its layers, where the first (nothing below it needs a
gradient) and the last (labels may trim it) are special. So a plan is counted on three layers
``[first, m, last]`` for each distinct level m in the middle, and on two, ``[first, last]``:

    total = F[first, last] + sum over middle layers i of (F[first, level_i, last] - F[first, last])

which is exact and takes a minute a plan instead of the tracing of 32 or 40 layers.

``share`` is ours over dense LoRA's. ``paper`` is the paper's. ``trimmed_share`` is ``share`` with
``trim_logits=True``. Details add ``linear_share``: ours over dense with the output head and the
attention products left out on both sides, which no plan makes sparse; and memory, from the same
graphs: ``held_share``, the bytes of activations that live from the forward to the backward (logits
among them), and ``memory_share``, the same with the model's weights on both sides. That is what is
allocated when the backward begins, but for the optimizer's state, which is the same for both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.support.graphs import Counted, batch_of, capture, llama
from benchmarks.support.published import BATCHES, LORA_RANK, MODELS, PLANS, RANK, Published, plan_of

Level = tuple[float, float]
DENSE: Level = (0.0, 0.0)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step, and parts of ``total``: what chooses channels, the output head's matmuls,
    and attention products (queries with keys, weights with values). ``held``: bytes of activations
    that live from the forward to the backward, logits among them."""

    total: int
    estimator: int
    head: int
    attention: int
    held: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def linears(self) -> int:
        """FLOPs of the decoder's linears, adapters and estimator included."""
        return self.total - self.head - self.attention


@dataclass
class Counter:
    """Counts stacks of layers of one model shape on one batch, each stack once.

    ``classify`` puts a classification head in the place of the language model's.
    """

    shape: dict[str, Any]
    batch: tuple[int, int, int]
    tokens: str = "context"
    classify: bool = False
    multiple: int = 16
    lora: int = LORA_RANK
    known: dict[tuple[tuple[Level, ...], bool, bool], Cost] = field(default_factory=dict)

    def stack(self, levels: tuple[Level, ...], *, trim: bool = False, ours: bool = False) -> Cost:
        """FLOPs of embeddings, these layers and the head, forward and backward; with ``ours`` as a
        part of a model that has sparse layers, if not here."""
        ours |= any(level != DENSE for level in levels)
        if (levels, trim, ours) not in self.known:
            model = llama(self.shape, len(levels), classify=self.classify, rank=self.lora)
            batch = batch_of(*self.batch)
            if self.classify:
                batch["labels"] = batch["labels"][:, -1] * 0
            sparse = any(level != DENSE for level in levels)
            plan = plan_of(levels, self.tokens, self.multiple) if sparse else None
            graphs = capture(model, batch, plan, rank=RANK, trim_logits=trim, lean=ours)
            vocabulary = int(self.shape["vocab_size"])
            self.known[levels, trim, ours] = cost_of(*graphs, vocabulary)
        return self.known[levels, trim, ours]

    def middle(self, level: Level, first: Level, last: Level, *, ours: bool) -> Cost:
        """FLOPs that one more layer of this level adds between two others."""
        if level == DENSE:
            first = last = DENSE
        return self.stack((first, level, last), ours=ours) - self.stack((first, last), ours=ours)

    def depth(self, levels: list[Level]) -> Cost:
        """FLOPs of a whole model, by the sum in this module's docstring."""
        first, *middle, last = levels
        ours = any(level != DENSE for level in levels)
        total = self.stack((first, last), ours=ours)
        for level in middle:
            total += self.middle(level, first, last, ours=ours)
        return total

    def trimmed(self, levels: list[Level]) -> Cost:
        """What ``trim_logits`` takes off: it is in the last layer and the head alone."""
        level = next((level for level in levels[1:-1] if level != DENSE), DENSE)
        stack = (levels[0], level, levels[-1])
        trim = level != DENSE and not self.classify
        return self.stack(stack) - self.stack(stack, trim=trim)


def cost_of(forwards: list[Counted], backwards: list[Counted], vocabulary: int) -> Cost:
    """The cost of some graphs; a matmul with a dimension of ``vocabulary`` is the output head's."""
    graphs = [*forwards, *backwards]
    return Cost(
        sum(g.total() for g in graphs),
        sum(g.estimator() for g in graphs),
        sum(g.of_size(vocabulary) for g in graphs),
        sum(g.attention() for g in graphs),
        sum(g.held() for g in forwards),
    )


def weight_bytes(published: Published) -> int:
    """Bytes of a whole model's parameters and adapters, in bf16."""
    shape = MODELS[published.model]
    model = llama(shape, int(shape["num_hidden_layers"]), classify=published.task == "GLUE")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def row(published: Published) -> dict[str, Any]:
    """Count one published plan: the row of the table, and details."""
    levels, classify = published.levels(), published.task == "GLUE"
    counter = Counter(MODELS[published.model], BATCHES[published.task], published.tokens, classify)
    dense = counter.depth([DENSE] * len(levels))
    ours = counter.depth(levels)
    trimmed = ours - counter.trimmed(levels)
    weights = weight_bytes(published)
    return {
        "model": published.model,
        "task": published.task,
        "share": round(ours.total / dense.total, 4),
        "paper": None if published.paper is None else published.paper / 100,
        "trimmed_share": round(trimmed.total / dense.total, 4),
        "dense_tflops": round(dense.total / 1e12, 3),
        "sparse_tflops": round(ours.total / 1e12, 3),
        "trimmed_tflops": round(trimmed.total / 1e12, 3),
        "linear_share": round(ours.linears / dense.linears, 4),
        "head_of_dense": round(dense.head / dense.total, 4),
        "attention_of_dense": round(dense.attention / dense.total, 4),
        "estimator_share": round(ours.estimator / ours.total, 6),
        "weights_gib": round(weights / 2**30, 3),
        "dense_held_gib": round(dense.held / 2**30, 3),
        "held_share": round(ours.held / dense.held, 4),
        "trimmed_held_share": round(trimmed.held / dense.held, 4),
        "memory_share": round((weights + ours.held) / (weights + dense.held), 4),
        "trimmed_memory_share": round((weights + trimmed.held) / (weights + dense.held), 4),
        "batch": BATCHES[published.task],
    }


FACE = ("model", "task", "share", "paper", "trimmed_share")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | task | share | paper | trimmed | decoder's linears alone | estimator, of ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        paper = "-" if r["paper"] is None else f"{r['paper']:.0%}"
        lines.append(
            f"| {r['model']} | {r['task']} | {r['share']:.1%} | {paper} | "
            f"{r['trimmed_share']:.1%} | {r['linear_share']:.1%} | {r['estimator_share']:.3%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Count the plans that are asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="FLOPs of every published plan, as shares.")
    parser.add_argument("--json", type=Path, help="the table, as a list")
    parser.add_argument("--details", type=Path, help="the same with FLOPs and estimator")
    names = [f"{p.model}/{p.task}" for p in PLANS]
    parser.add_argument("--plan", nargs="*", choices=names, default=names)
    args = parser.parse_args()
    rows = []
    for published in PLANS:
        if f"{published.model}/{published.task}" in args.plan:
            rows.append(row(published))
            print(rows[-1], flush=True)
    print(table(rows))
    if args.json:
        face = [{key: r[key] for key in FACE} for r in rows]
        args.json.write_text(json.dumps(face, indent=1) + "\n", encoding="utf-8")
    if args.details:
        args.details.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
