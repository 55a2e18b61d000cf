"""Token lists come in few lengths that waste few rows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from benchmarks.support.published import BATCHES
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


def published(task: str, padded: bool) -> Callable[[random.Random], Lengths]:
    """A published batch shape; answers are half to one and a half times as long as published, and
    samples with padding fill half of their length or more."""
    samples, length, outputs = BATCHES[task]

    def draws(draw: random.Random) -> Lengths:
        real = [draw.randint(length // 2, length) if padded else length for _ in range(samples)]
        dense = sum(min(r - 1, draw.randint(outputs // 2, outputs * 3 // 2)) for r in real)
        sparse, total = sum(real) - dense, samples * length
        return (sparse, dense, sparse + dense, total - sparse) if padded else (sparse, dense)

    return draws


def simulated(draws: Callable[[random.Random], Lengths], seed: int) -> tuple[int, float, float]:
    """Classes that 600 batches met, the share of batches that found one, and the filler's share of
    these batches' rows."""
    draw, capacities = random.Random(seed), Capacities()
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
    return len(met), held / 600, filler / rows


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("draws", "held", "filler"),
    [
        (without_padding, 0.9, 0.03),
        (with_padding, 0.9, 0.08),
        # Four lists of two samples vary too much for eight classes.
        *((published(task, False), 0.88, 0.04) for task in BATCHES),
        *((published(task, True), 0.8, 0.1) for task in BATCHES if BATCHES[task][0] > 2),
    ],
    ids=["packed", "padded", *BATCHES, *(f"{t}, padded" for t in BATCHES if BATCHES[t][0] > 2)],
)
def test_a_run_meets_few_lengths(
    draws: Callable[[random.Random], Lengths], held: float, filler: float, seed: int
) -> None:
    met, share, wasted = simulated(draws, seed)
    assert met <= CLASSES + 2 and share >= held and wasted <= filler, (met, share, wasted)


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


def test_few_lengths_are_classes_as_they_are() -> None:
    seen = [(10, 64), (11, 64), (100, 64), (103, 64), (10, 64)]
    assert classes_of(seen, 4) == sorted(set(seen))


def test_classes_keep_what_lists_have_in_common() -> None:
    """A length that never varies is kept exactly, and the others vary as those seen."""
    seen = [(100 + 7 * i % 50, 64) for i in range(24)]
    found = classes_of(seen, 4)
    assert len(found) == 4 and {lengths[1] for lengths in found} == {64}
    tops = sorted(lengths[0] for lengths in found)
    assert tops[0] < 120 and max(seen)[0] <= tops[-1] < 200
