"""Sensitivity tables: what is measured, what it costs to measure, and that nothing else changes."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.measured_models import LEVELS, batches, measure
from tests.support.slow import slow
from tests.support.tiny_models import tiny


def eval_loss(model: nn.Module, data: list[dict[str, Any]]) -> float:
    """Mean loss of the eager model in evaluation mode, weighted by the labels that count."""
    model.eval()
    weights = [int((batch["labels"] != -100).sum()) for batch in data]
    with torch.no_grad():
        losses = [float(model(**batch, use_cache=False).loss) for batch in data]
    model.train()
    return sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["all", "context"])
def test_each_row_is_the_masked_dense_loss(tokens: str) -> None:
    """Independent route: compile with one region sparse, take its choice, mask the eager model."""
    model = oracle.llama(layers=2, dtype=torch.float64, dropout=0.1)
    data = batches((13,))
    table = measure(model, data, tokens=tokens)
    assert table.dense_loss == pytest.approx(eval_loss(model, data), rel=1e-6)
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    assert [(r.region, r.level) for r in table.rows] == [(n, s) for n in names for s in LEVELS]
    if tokens == "context":
        assert table.sparse_tokens == pytest.approx(10 / 23)  # five a sample
        return
    assert table.sparse_tokens == 1.0
    assert any(abs(row.loss_change) > 1e-5 for row in table.rows)
    for row in table.rows:
        quiet = oracle.llama(layers=2, dtype=torch.float64)
        got = oracle.run_compiled(quiet, data[0], oracle.plan_of({row.region: row.level}), "eager")
        expected = oracle.reference_step(quiet, data[0], got.record)
        assert row.loss == pytest.approx(float(expected.loss), rel=1e-6), row
        assert row.loss_change == row.loss - table.dense_loss


@pytest.mark.slow
def test_saved_flops_are_those_of_the_kept_channels() -> None:
    table = measure(oracle.llama(layers=1))
    by_kind = {(row.kind, row.level): row.saved for row in table.rows}
    assert table.base_flops == 48 * 48 * 2 + 16 * 48 * 2 + 3 * 48 * 112
    assert by_kind["ffn", 0.75] == 3 * 48 * 84
    assert by_kind["attention", 0.5] == (2 * 48 * 48 + 2 * 16 * 48) // 2
    assert table.share_saved(table.rows[0]) == table.rows[0].saved / table.base_flops


@pytest.mark.slow
def test_graphs_do_not_grow_with_depth() -> None:
    """One dense graph and one for each kind and level."""
    for layers in (2, 4):
        torch.compiler.reset()
        table = measure(oracle.llama(layers=layers))
        assert (len(table.rows), table.graphs) == (4 * layers, 1 + 2 * len(LEVELS))


@pytest.mark.slow
def test_batches_of_other_lengths_share_graphs() -> None:
    data = batches((13, 18, 9))
    table = measure(oracle.llama(layers=2), data)
    assert table.graphs == 1 + 2 * len(LEVELS)
    assert table.dense_loss == pytest.approx(eval_loss(oracle.llama(layers=2), data), rel=1e-5)


def test_a_model_without_numbered_blocks_is_compiled_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.down(torch.relu(self.up(x))).square().mean()}

    torch.manual_seed(0)
    table = measure(Net(), [{"x": torch.randn(3, 5, 8)}])
    assert [(row.kind, row.keys) for row in table.rows] == [("ffn", ("up", "down"))] * 2
    assert table.graphs == 1 + len(LEVELS)


# ---------------------------------------------------------------- nothing else changes


@pytest.mark.parametrize("breaks", [False, slow(True)])
def test_the_model_stays_as_it_was(breaks: bool) -> None:
    model = tiny(2, dropout=0.1)
    model.layers[1].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before, weights = oracle.marks(model), oracle.copy_of_weights(model)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    data: list[Any] = batches()
    if breaks:
        data[1]["input_ids"] = data[1]["input_ids"] + 1000  # outside the vocabulary
        with pytest.raises(IndexError):
            measure(model, data)
    else:
        measure(model, data)
    oracle.assert_untouched(model, before, weights)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("data", "levels", "error", "words"),
    [
        ([], LEVELS, slx.SensitivityError, "no batch"),
        (None, (), slx.SensitivityError, "levels"),
        (None, (0.5, 1.0), slx.SensitivityError, "below 1"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], LEVELS, slx.SensitivityError, "loss"),
    ],
)
def test_bad_requests_are_refused(data: Any, levels: Any, error: Any, words: str) -> None:
    model = oracle.llama()
    before = oracle.marks(model)
    with pytest.raises(error, match=words):
        slx.sensitivity(
            model, oracle.estimator_of(model), batches() if data is None else data, levels,
            backend="eager", progress=False,
        )  # fmt: skip
    assert oracle.marks(model) == before


def test_a_compiled_model_is_refused_and_stays_compiled() -> None:
    model = oracle.llama()
    slx.compile(model, oracle.estimator_of(model), plan=0.5, backend="eager")
    with pytest.raises(slx.CompileError, match="restore"):
        measure(model)
    assert get_runtime(model).active


def test_regions_too_narrow_to_cut_are_named() -> None:
    with pytest.raises(slx.SensitivityError, match="rounds up"):
        measure(oracle.llama(), channel_multiple=112)


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table() -> slx.SensitivityTable:
    return measure(oracle.llama())


@pytest.mark.slow
def test_save_and_load(table: slx.SensitivityTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    assert slx.SensitivityTable.load(tmp_path / "t.json") == table
    (tmp_path / "bad.json").write_text('{"format": "other"}')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(slx.SensitivityError, match=name):
            slx.SensitivityTable.load(tmp_path / name)


def test_text_has_a_line_for_every_row(table: slx.SensitivityTable) -> None:
    lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 2
    assert all(row.region in line for row, line in zip(table.rows, lines[1:-1], strict=True))


def test_plot(table: slx.SensitivityTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.plot(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(slx.SensitivityError, match="plot"):
        table.plot(tmp_path / "u.png")


@pytest.mark.slow
def test_inductor_measures_the_same() -> None:
    model = oracle.llama(layers=2)
    eager, native = measure(model), measure(model, backend="inductor")
    assert native.graphs == 1 + 2 * len(LEVELS)
    for a, b in zip(eager.rows, native.rows, strict=True):
        assert (a.region, a.level, a.saved) == (b.region, b.level, b.saved)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
