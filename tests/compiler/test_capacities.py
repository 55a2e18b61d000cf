"""Token lists come in few lengths that waste few rows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sparselora_fx.compiler.capacities import CLASSES, WATCHED, Capacities, Lengths, classes_of


def without_padding(draw: random.Random) -> Lengths:
    """8 packed samples of 512 tokens, with answers of 60 to 180."""
    dense = sum(draw.randint(60, 180) for _ in range(8))
    return 4096 - dense, dense


def with_padding(draw: random.Random) -> Lengths:
    """The same with prompts and answers of varying lengths, and padding behind them."""
    prompts = sum(min(300, int(draw.lognormvariate(5, 0.3))) for _ in range(8))
    answers = sum(min(212, int(draw.lognormvariate(4.8, 0.4))) for _ in range(8))
    return prompts, answers, prompts + answers, 4096 - prompts


@pytest.mark.parametrize(("draws", "bound"), [(without_padding, 0.03), (with_padding, 0.12)])
def test_a_run_meets_few_lengths(draws: Callable[[random.Random], Lengths], bound: float) -> None:
    draw, capacities = random.Random(0), Capacities()
    met, held, filler, rows = set(), 0, 0, 0
    for _ in range(600):
        lengths = draws(draw)
        chosen = capacities.choose(lengths)
        if chosen is not None:
            assert len(chosen) == len(lengths)
            assert all(room >= length for room, length in zip(chosen, lengths, strict=True))
            met.add(chosen)
            held += 1
            filler += sum(chosen) - sum(lengths)
            rows += sum(lengths)
    assert len(met) <= CLASSES + 2
    assert held >= 0.85 * 600
    assert filler <= bound * rows


def test_lengths_that_never_change_are_taken_at_once_and_waste_nothing() -> None:
    capacities = Capacities()
    assert [capacities.choose((30, 70)) for _ in range(4)] == [None, None, (30, 70), (30, 70)]


def test_a_batch_that_no_class_holds_is_left_as_it_is() -> None:
    capacities = Capacities()
    for i in range(WATCHED):
        capacities.choose((100 + i, 50))
    assert capacities.choose((1000, 50)) is None
    assert capacities.choose((1, 1)) is None  # mostly filler


def test_outliers_get_a_class_when_they_are_many() -> None:
    capacities = Capacities()
    for i in range(WATCHED):
        capacities.choose((100 + i, 50))
    chosen = [capacities.choose((140 + i % 3, 55)) for i in range(20)]
    assert chosen[0] is None and chosen[-1] is not None


def test_equal_lengths_are_kept_and_others_merged_cheaply() -> None:
    seen = [(10, 64), (11, 64), (100, 64), (103, 64)]
    assert sorted(classes_of(seen, 2)) == [(12, 64), (105, 64)]
    assert sorted(classes_of(seen, 4)) == seen
