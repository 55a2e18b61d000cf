"""A model is left as it was, also where something is raised in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselora_fx.model.preserve import kept_buffers, kept_modes, kept_random_numbers


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
