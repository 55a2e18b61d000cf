"""The table of measured kernels that is shipped, and what it decides on the card it is for."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks import gpu
from sparselora_fx.lowering import constraints, inductor, measured, triton
from sparselora_fx.lowering.constraints import Problem

H200 = "NVIDIA H200"
CUDA = torch.device("cuda", 0)
HIDDEN, WIDE = 4096, 14336


def problem(op: str, kept: int, tokens: int = 3072) -> Problem:
    """A matmul of a Llama-3-8B feed-forward block, in bf16."""
    out_sliced = triton.FAMILIES[op].template == "out_sliced"
    sizes = (kept, HIDDEN) if out_sliced else (HIDDEN, kept)
    weight = (HIDDEN, WIDE) if triton.FAMILIES[op].transposed else (WIDE, HIDDEN)
    return Problem(
        devices=(CUDA,) * 3, dtype=torch.bfloat16, weight_dtype=torch.bfloat16,
        index_dtype=torch.int64, tokens=tokens, outputs=sizes[0], inner=sizes[1], kept=kept,
        weight=weight, contiguous_rows=True,
    )  # fmt: skip


def choice(op: str, kept: int, tokens: int = 3072) -> str | None:
    """Why gather + matmul is taken on an H200, or None: a template is."""
    asked = problem(op, kept, tokens)
    family = triton.FAMILIES[op]
    found = measured.ratio(H200, family.template, tokens, asked.outputs, asked.inner)
    return constraints.unpromising(asked, found)


@pytest.mark.parametrize("op", sorted(triton.FAMILIES))
@pytest.mark.parametrize("kept", [144, 192, 432, 736])
def test_few_channels_go_through_a_template(op: str, kept: int) -> None:
    assert choice(op, kept) is None


@pytest.mark.parametrize("op", sorted(triton.FAMILIES))
@pytest.mark.parametrize("kept", [2560, 3584, 7168])
def test_many_channels_are_gathered_for_cublas(op: str, kept: int) -> None:
    assert choice(op, kept) == constraints.SLOWER


@pytest.mark.parametrize(("op", "family"), sorted(triton.FAMILIES.items()))
def test_between_them_each_template_has_its_own_measurement(op: str, family: triton.Family) -> None:
    """At 1440 channels out-sliced loses by 10 to 24 %, reduction-sliced wins by 12 to 17 %."""
    expected = constraints.SLOWER if family.template == "out_sliced" else None
    assert choice(op, 1440) == expected


@pytest.mark.parametrize(("kept", "tokens"), [(16, 3072), (432, 512), (432, 16384), (9000, 3072)])
def test_what_was_not_measured_is_gathered(kept: int, tokens: int) -> None:
    allowed = {constraints.NOT_MEASURED, constraints.RAGGED_KEPT}
    assert choice("sliced_linear", kept, tokens) in allowed


def test_the_lowering_asks_for_the_name_of_the_card() -> None:
    properties = type("Properties", (), {"name": H200})()
    with (
        patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        patch.object(inductor, "size_hint", int),
    ):
        family = triton.FAMILIES["sliced_linear"]
        assert triton.measured_ratio(family, problem("sliced_linear", 144)) == 0.625


def test_every_card_says_what_its_points_hold_for() -> None:
    table = json.loads(measured.SHIPPED.read_text(encoding="utf-8"))
    provenance = table.pop(measured.PROVENANCE)
    assert H200 in table and provenance.keys() == table.keys()
    assert {"date", "commit", "torch", "triton"} <= provenance[H200].keys()
    assert provenance[H200]["commit"] == "b8e6301"
    assert {point["op"] for point in table[H200]} == set(triton.FAMILIES)


def test_provenance_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({measured.PROVENANCE: {"card": {"commit": "abc"}}, "card": []}))
    monkeypatch.setenv("SPARSELORA_KERNEL_TABLE", str(path))
    assert measured.ratio(measured.PROVENANCE, "out_sliced", 1, 1, 1) is None
    assert "abc" not in measured.key()  # who measured it changes no generated code


def test_a_card_is_added_beside_the_others_with_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(measured.SHIPPED.read_bytes())
    row = next(gpu.kernel_cases()) | {"picked_ms": 1.0, "fallback_ms": 2.0}
    gpu.update(path, {"hardware": {"gpu": "card", "commit": "abc"}, "kernels": [row]})
    table = json.loads(path.read_text())
    assert table[H200] == json.loads(measured.SHIPPED.read_text())[H200]
    assert table[measured.PROVENANCE]["card"]["commit"] == "abc"
    assert [point["ratio"] for point in table["card"]] == [0.5]


def test_what_decides_is_measured_first() -> None:
    """A card is added in little time: 16 rows, two of their four times, before the whole table."""
    rows = list(gpu.kernel_cases())
    first = gpu.deciding(rows)
    assert len(first) == 16 and {row["what"] for row in first} == set(gpu.TEMPLATES)
    kept = sorted({row["kept"] for row in first})
    assert kept[0] <= 192 and kept[-1] >= 3584
    assert {row["tokens"] for row in first} == {1024, 4096}
