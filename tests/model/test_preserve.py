"""A model is left as it was, also where something is raised in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
from torch import nn

from sparselora_fx.model.preserve import (
    RandomState,
    kept_buffers,
    kept_modes,
    kept_random_numbers,
)


def test_each_module_has_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), kept_modes(model):
        model.eval()
        raise KeyError
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_random_numbers_go_on() -> None:
    model = nn.Linear(2, 2)
    torch.manual_seed(3)
    expected = [torch.randn(4) for _ in range(2)][1]
    torch.manual_seed(3)
    torch.randn(4)
    with kept_random_numbers(model):
        torch.randn(7)
    assert torch.equal(torch.randn(4), expected)


@pytest.fixture
def generator() -> Iterator[None]:
    """numpy's own generator, and after the test as it was."""
    mine, state = numpy.random.get_bit_generator(), numpy.random.get_state()
    yield
    numpy.random.set_bit_generator(mine)
    numpy.random.set_state(state)


DRAWS: list[Callable[[], object]] = [
    lambda: numpy.random.rand(3),
    lambda: numpy.random.normal(),  # makes two numbers, and keeps one for the next call
    lambda: numpy.random.permutation(700),  # more words than the generator makes at once
    lambda: numpy.random.seed(11),
]


@pytest.mark.parametrize("other", [False, True], ids=["twister", "another generator"])
@pytest.mark.usefixtures("generator")
def test_numpy_goes_back_to_where_it_was(other: bool) -> None:
    """Also where a state is the one that was asked for last."""
    if other:
        numpy.random.set_bit_generator(numpy.random.PCG64(5))
    else:
        numpy.random.seed(5)
    for draw in (*DRAWS[: 1 if other else 4], *DRAWS[:2]):
        state = RandomState.of([])
        assert state.numpy is not None
        expected = numpy.random.normal(size=3)
        state.put()
        again = RandomState.of([])
        assert numpy.array_equal(numpy.random.normal(size=3), expected)
        again.put()
        assert numpy.array_equal(numpy.random.normal(size=3), expected)
        draw()


@pytest.mark.usefixtures("generator")
def test_a_normal_number_that_is_kept_belongs_to_the_state() -> None:
    numpy.random.seed(5)
    numpy.random.normal()
    with_one = RandomState.of([])
    kept = numpy.random.normal()  # the generator's memory does not change
    without = RandomState.of([])
    following = numpy.random.normal()
    without.put()
    assert numpy.random.normal() == following
    with_one.put()
    again = RandomState.of([])  # the memory is what it was when the number was not kept
    assert numpy.random.normal() == kept
    again.put()
    assert numpy.random.normal() == kept


def test_buffers_but_ours_are_put_back_in_place() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("ours", torch.zeros(2))
    before = model.running_mean.clone()
    memory = model.running_mean.data_ptr()
    with kept_buffers(model, {id(model.ours)}):
        model(torch.randn(5, 3) + 4)
        model.ours += 1
        assert not torch.equal(model.running_mean, before)
    assert torch.equal(model.running_mean, before) and model.running_mean.data_ptr() == memory
    assert model.ours.tolist() == [1, 1]
