"""The demonstration: fresh adapters in place, one table over seeds."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

import sparselora_fx as slx
from benchmarks.demo.__main__ import Demo, Row, parsed, sparse_part, spread, table
from benchmarks.demo.models import load_model, renew_adapters


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_adapters_are_renewed_in_place_and_alike() -> None:
    """Two models get the same fresh adapters from a seed, and keep the tensors that they had."""
    models = [load_model(0), load_model(1)]
    places = [[p.data_ptr() for p in model.parameters()] for model in models]
    with torch.no_grad():
        for module in models[0].modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].weight.normal_()
    for model in models:
        renew_adapters(model, 7)
    first, second = (adapters(model) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert all(first[n].any() != ("lora_B" in n) for n in first)
    assert places == [[p.data_ptr() for p in model.parameters()] for model in models]
    renew_adapters(models[0], 8)
    assert any(not torch.equal(first[n], p) for n, p in adapters(models[0]).items())


def test_the_table_shows_the_spread_over_seeds() -> None:
    assert spread([0.5], ".1%") == "50.0%"
    assert spread([0.5, 0.25, 0.75], ".1%") == "50.0% (25.0% to 75.0%)"
    rows = [
        Row("dense LoRA", [0.2, 0.4], [0.5, 0.7], 12.4, 1.0, 1.0),
        Row("pretrained", [1.0], [0]),
    ]
    first, second = table(rows).splitlines()[1:]
    assert "0.3000 (0.2000 to 0.4000)" in first and "60.0% (50.0% to 70.0%)" in first
    assert first.split()[-4:] == ["12", "ms", "1.00", "100.0%"]
    assert second.split()[-3:] == ["-", "-", "-"]


def test_how_much_of_a_training_is_sparse() -> None:
    assert sparse_part(slx.SparsityPlan(0.5, start_step=0), 100) == 1.0
    assert sparse_part(slx.SparsityPlan(0.5, start_step=10, end_step=80), 100) == pytest.approx(0.7)
    plan = slx.SparsityPlan(0.5, start_step=0.05, end_step=0.8)
    assert sparse_part(plan, 40) == pytest.approx(0.75)


@pytest.mark.slow
def test_the_whole_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of a few steps: dense and sparse differ in their answers' loss, little."""
    words = "--steps 6 --batch 4 --tests 8 --seeds 2 --pairs 1 --backend eager"
    pretrained, dense, sparse = Demo(parsed(words.split())).run()
    assert len(dense.losses) == len(sparse.losses) == 2 and dense.losses[0] != dense.losses[1]
    assert all(0 < abs(a - b) < 1 for a, b in zip(dense.losses, sparse.losses, strict=True))
    assert max(dense.losses + sparse.losses) < pretrained.losses[0]
    assert sparse.flops is not None and 0 < sparse.flops < 1
    assert "the whole training is" in capsys.readouterr().out
