"""Down by rungs, up after a quiet while, never above the plan, and not for ever."""

from __future__ import annotations

import json

from sparselora_fx.watch.ladder import FAILURES, GRAPHS, Ladder


def ladder(**planned: float) -> Ladder:
    made = Ladder(quiet=2)
    made.add(planned or {"a": 0.9, "b": 0.5})
    return made


def ran(made: Ladder) -> None:
    made.note_compiled()


def test_a_region_walks_down_to_dense_and_stays() -> None:
    made, seen = ladder(), []
    for _ in range(6):
        made.down(["a"])
        seen.append(made.levels()["a"])
        ran(made)
    assert seen == [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert made.levels()["b"] == 0.5
    assert not any(made.rest() for _ in range(50))


def test_it_climbs_after_a_quiet_while_and_never_above_the_plan() -> None:
    made = ladder()
    made.down(["a"])
    made.down(["a"])
    moved = [made.rest() for _ in range(12)]
    assert [m["a"] for m in moved if m] == [0.75, 0.9]
    assert made.levels() == {"a": 0.9, "b": 0.5}


def test_drift_after_a_climb_doubles_the_wait_and_then_ends_it() -> None:
    made = ladder()
    made.down(["a"])
    waits = []
    for _ in range(FAILURES + 1):
        waits.append(next((i for i in range(1, 40) if made.rest()), 0))
        made.down(["a"])
    assert waits == [2, 4, 0]


def test_a_pause_ends_for_all_regions_together() -> None:
    made = ladder()
    assert made.pause() == {"a": 0.25, "b": 0.25} and not made.pause()
    other = Ladder(quiet=2)
    other.take(json.loads(json.dumps(made.to_json())))
    moved = [made.rest() for _ in range(20)]
    assert moved == [other.rest() for _ in range(20)]
    assert [m for m in moved if m] == [{"a": 0.5, "b": 0.5}, {"a": 0.75}, {"a": 0.9}]
    made.pause()
    made.down(["a"])  # drift in a pause ends it for that region
    moved = [made.rest() for _ in range(5)]
    assert [m for m in moved if m] == [{"b": 0.5}] and made.levels()["a"] == 0.0


def test_for_good_is_for_good_and_the_others_climb_back() -> None:
    made = ladder()
    assert made.pause() | made.down(["a"], for_good=True) == {"a": 0.0, "b": 0.25}
    moved = [made.rest() for _ in range(20)]
    assert [m for m in moved if m] == [{"b": 0.5}] and made.levels()["a"] == 0.0


def test_a_rung_that_is_compiled_for_is_taken_first() -> None:
    made = ladder(a=0.9)
    for _ in range(2):  # 0.9 and 0.5 have run, 0.75 has not
        made.regions["a"].at ^= 2
        ran(made)
    assert made.down(["a"]) == {"a": 0.5}


def test_the_number_of_compiled_ways_is_bounded() -> None:
    made = Ladder(quiet=1)
    made.add({name: 0.99 for name in "abcdefgh"})
    for turn in range(200):
        made.down(["abcdefgh"[turn % 8]])
        ran(made)
        for _ in range(turn % 5):
            made.rest()
            ran(made)
    # Beyond the bound a region goes to dense at once: each can do so once.
    assert len(made.compiled) <= GRAPHS + 8


def test_state_survives_json() -> None:
    made = ladder()
    made.down(["a"])
    made.rest()
    other = Ladder(quiet=2)
    other.take(json.loads(json.dumps(made.to_json())))
    assert other == made
    assert other.rest() == made.rest() != {}
