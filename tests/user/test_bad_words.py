"""What cannot be meant is refused by name, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import sparselora_fx as slx
from tests.support import oracle


@pytest.mark.parametrize(
    "word", ["compile_eval", "regional", "precompile", "trim_logits", "strict", "dynamic"]
)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_switches_are_bools(word: str, value: Any) -> None:
    if word == "dynamic" and value is None:
        pytest.skip("dynamic=None is the default: a second length makes sizes dynamic")
    model = oracle.llama()
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    with pytest.raises(slx.CompileError, match=f"{word} must be True or False, got"):
        slx.compile(model, oracle.estimator_of(model), plan=0.5, **{word: value})
    oracle.assert_untouched(model, before, weights)


def test_steps_are_whole_numbers() -> None:
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=0.5, backend="eager")
    for n, total in (
        ("a", 10), (0, "b"), (None, 10), (1.5, 10), (True, 10), (torch.tensor(1), 10), (-1, 10),
        (0, 0), (0, 2.0),
    ):  # fmt: skip
        with pytest.raises(slx.PlanError, match="allowed: two ints"):
            slx.step(model, n, total)  # type: ignore[arg-type]
    slx.step(model, numpy.int64(3), numpy.int64(10))  # type: ignore[arg-type]
    with pytest.raises(slx.CompileError, match="not compiled"):
        slx.step(None, 0, 1)  # type: ignore[arg-type]


def test_batches_are_mappings() -> None:
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=0.5, backend="eager")
    with pytest.raises(slx.CompileError, match="count_tokens got a list"):
        slx.count_tokens(model, [1, 2])  # type: ignore[arg-type]
    for batch in (5, torch.ones(2, 3)):
        with pytest.raises(slx.CompileError, match="a batch is a mapping"):
            slx.explain(model, batch)  # type: ignore[arg-type]
