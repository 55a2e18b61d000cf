"""The layout of frozen weights: strides change, nothing else; ties are kept; restore undoes it."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.model.weight_layout import (
    GatherLayout,
    gathered_across,
    is_private,
    likely_consumers,
)

HERE = ("cpu",)  # the code does not depend on the device; by default only CUDA is touched


class Block(nn.Module):
    """One feed-forward block with frozen weights, gate and up ``[I, D]``, down ``[D, I]``."""

    def __init__(self, d: int = 8, i: int = 24) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(d, i, bias=False),
                "up": nn.Linear(d, i, bias=False),
                "down": nn.Linear(i, d, bias=False),
            }
        )
        self.requires_grad_(False)

    @property
    def down(self) -> nn.Parameter:
        return self.mlp["down"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp["down"](torch.relu(self.mlp["gate"](x)) * self.mlp["up"](x))


def apply(model: nn.Module, layout: GatherLayout | None = None) -> int:
    return (layout or GatherLayout()).apply(model, frozen_weights(model), devices=HERE)


def test_only_strides_change_and_restore_undoes_it() -> None:
    model = Block()
    before = copy.deepcopy(model.state_dict())
    parameter, output = model.down, model(torch.ones(3, 8))
    layout = GatherLayout()
    assert apply(model, layout) == 1
    assert model.down is parameter and model.down.stride() == (1, 8)
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.shape == before[name].shape
    torch.testing.assert_close(model(torch.ones(3, 8)), output)
    layout.restore()
    assert model.down is parameter and model.down.stride() == (24, 1)
    assert torch.equal(model(torch.ones(3, 8)), output)
    assert not layout.changed


def test_nothing_is_touched_on_a_cpu_by_default() -> None:
    model = Block()
    assert GatherLayout().apply(model, frozen_weights(model)) == 0
    assert model.down.is_contiguous()


def test_applying_twice_changes_nothing_more() -> None:
    model, layout = Block(), GatherLayout()
    assert [apply(model, layout), apply(model, layout)] == [1, 0]


def test_state_dict_survives_a_round_trip(tmp_path: Path) -> None:
    model, other = Block(), Block()
    apply(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other.down, model.down) and other.down.is_contiguous()
    model.load_state_dict(Block().state_dict())  # keeps the layout
    assert model.down.stride() == (1, 8)


def test_tied_and_shared_weights_are_left_alone() -> None:
    tied = nn.ModuleList([Block(), Block()])
    tied[1].mlp["down"].weight = tied[0].mlp["down"].weight
    assert apply(tied) == 0

    same_memory = nn.ModuleList([Block(), Block()])
    same_memory[1].mlp["down"].weight = nn.Parameter(same_memory[0].down.data, requires_grad=False)
    assert apply(same_memory) == 0

    model = Block()
    held = model.down.detach()  # other code keeps a reference to the memory
    assert apply(model) == 0 and held.data_ptr() == model.down.data_ptr()


def test_what_is_not_private() -> None:
    def frozen(values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values, requires_grad=False)

    plain = frozen(torch.ones(2, 3))
    assert is_private(plain)
    assert not is_private(nn.Parameter(torch.ones(2, 3)))
    assert not is_private(frozen(torch.ones(2, 3, device="meta")))
    flat = torch.ones(12)
    assert not is_private(nn.Parameter(flat[:6].view(2, 3), requires_grad=False))


def test_trainable_weights_are_left_alone() -> None:
    model = Block()
    model.down.requires_grad_(True)
    assert apply(model) == 0


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"gate": (24, 8), "up": (24, 8), "down": (8, 24)}, ["down"]),
        ({"q": (16, 8), "k": (4, 8), "v": (4, 8), "o": (8, 16)}, ["o"]),
        ({"c_attn": (24, 8), "c_proj": (8, 8)}, ["c_proj"]),
        ({"query": (8, 8), "key": (8, 8), "value": (8, 8), "up": (32, 8)}, []),
        ({"alone": (8, 24)}, []),
        ({"query": (8, 8), "key": (8, 8), "value": (8, 8)}, []),  # the way back is elsewhere
    ],
)
def test_likely_consumers(shapes: dict[str, tuple[int, int]], expected: list[str]) -> None:
    model = nn.Module()
    model.block = nn.ModuleDict({name: nn.Linear(k, n) for name, (n, k) in shapes.items()})
    model.requires_grad_(False)
    found = likely_consumers(frozen_weights(model))
    assert [weight.name.split(".")[-1] for weight in found] == expected


def test_weights_stored_transposed_are_gathered_across_when_they_produce() -> None:
    """GPT-2's Conv1D stores ``[K, N]``: its consumers have their layout, its producers do not."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Module()
    model.attn = nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_proj": Conv1D(8, 8)})
    model.requires_grad_(False)
    assert [w.name for w in gathered_across(frozen_weights(model))] == ["attn.c_attn"]


def relayout_growth() -> int:
    """Re-lay forty weights of 8 MiB and put them back; by how many MiB the peak grew."""
    model = nn.ModuleList(Block(1024, 2048) for _ in range(40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = GatherLayout()
    assert apply(model, layout) == 40
    layout.restore()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


@pytest.mark.slow
def test_peak_memory_is_one_layer() -> None:
    """In a process of its own, whose allocator gives each freed weight back at once: in one that
    other tests have fragmented, the peak says more about the heap than about us."""
    code = "from tests.model.test_weight_layout import relayout_growth; print(relayout_growth())"
    grown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(grown) < 80, f"{grown.strip()} MiB"
