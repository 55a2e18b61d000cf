"""The HTML report: what it says, and that a browser shows it and asks nobody for anything."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.speed_check import Verdict
from sparselora_fx.user.folding import PlanKeys
from sparselora_fx.user.linear_rows import LinearRow
from sparselora_fx.user.report import skipped_percent
from sparselora_fx.user.report_charts import bars
from sparselora_fx.user.report_history import Stability, probe_rows, stability
from tests.support import oracle
from tests.support.tiny_models import tiny
from tests.support.token_batches import ragged

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("td, th, p, summary")].map(e => {
    const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  }).reduce((a, b) => Math.min(a, b));
}"""


def compiled(layers: int = 3, **options: Any) -> nn.Module:
    model = tiny(layers, channels=112)
    plan = slx.SparsityPlan({"layers.1": 0.5, "layers.2.mlp": 0.75}, start_step=0)
    return slx.compile(model, oracle.estimator_of(model), plan=plan, backend="eager", **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A report with two recorded steps, and the overlaps it should tell, counted here."""
    model = compiled(watch=slx.Watch(every=1, tolerance=1e9))
    records = []
    for seed in (0, 1):
        data = ragged()
        generator = torch.Generator().manual_seed(seed)
        data["input_ids"] = torch.randint(1, 90, data["input_ids"].shape, generator=generator)
        with slx.record(model) as record:
            oracle.step(model, data)
        records.append(record)
    graphs = get_runtime(model).graphs
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert slx.report(model, ragged(), file, recordings=records) == file
    probes = slx.drift(model).to_json()["probes"]
    assert len(probes) == 2
    for cells in probe_rows(probes, PlanKeys([])):
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        assert row in file.read_text(encoding="utf-8"), row
    assert get_runtime(model).graphs == graphs
    overlaps = {}
    for region, choices in records[0].selections.items():
        for choice, kept in choices.items():
            later = records[1].selections[region][choice]
            overlaps[f"{region}/{choice}"] = torch.isin(kept, later).double().mean().item()
    return file, overlaps


def test_it_says_what_explain_says(written: tuple[Path, dict[str, float]]) -> None:
    text = written[0].read_text(encoding="utf-8")
    assert "a sparse step would take" in text and re.search(
        r"FLOPs of a step: 1\.\d\dx fewer", text
    )
    assert "6 linears sliced" in text
    assert "Time: not measured yet." in text and 'id="drift"' in text
    assert text.count('data-find="') == 2  # two feed-forwards
    assert 'data-find="layers.2.mlp" title="layers.2.mlp: 32 of 112"' in text
    assert "sliced_linear" in text and "slice_sites" in text and "after: sliced" in text
    for where, share in written[1].items():
        region, choice = where.removeprefix("base_model.model.model.").split("/")
        row = rf"<td>{re.escape(region)}</td><td>{choice}</td><td>{100 * share:.0f} %</td>"
        assert re.search(row, text), (where, share)


def test_the_choices_of_recorded_steps() -> None:
    """Of 8 channels 4 are kept: first the same ones, then two others, where random choices would
    differ in two as well."""
    name = "m.layers.0.mlp"
    rows = [LinearRow(f"{name}.up", "8x4", name, "ffn", "4 of 8", "out")]
    sets = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 4, 5]]
    records = [slx.Recording({name: {"ffn": torch.tensor(kept)}}) for kept in sets]
    keys = PlanKeys([row.name for row in rows])
    assert stability(records, rows, keys) == [
        Stability("layers.0.mlp", "ffn", mean=0.75, least=0.5, always=0.5, dependence=0.5)
    ]
    assert stability(records[1:], rows, keys)[0].dependence == 1.0
    assert stability(records[:2], rows, keys)[0].dependence == 0.0
    assert stability(records[:1], rows, keys) == []
    assert stability(records, [], keys)[0].dependence is None


def test_charts_are_of_the_page() -> None:
    """Its colours and no others, text as text, words for those who cannot see it."""
    drawn = str(bars("steps", [("dense", 20.0, "20 ms"), ("sparse", 5.0, "5 ms")]))
    assert drawn.startswith("<svg viewBox=") and 'aria-label="steps: dense: 20 ms; sparse' in drawn
    assert not re.findall(r"https?://|<script|<metadata", drawn) and ">20 ms</text>" in drawn
    assert "var(--mark)" in drawn and "var(--ink)" in drawn and "#010101" not in drawn


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(slx.CompileError, match=r"pip install 'sparselora_fx\[plot\]'"):
        bars("steps", [("dense", 20.0, "20 ms")])


@pytest.mark.slow
def test_times_are_shown_once_they_are_measured(tmp_path: Path) -> None:
    model = compiled()
    get_runtime(model).speed.verdict = Verdict(0.5, 3, 10.0, 20.0, "a card")
    text = slx.report(model, ragged(), tmp_path / "report.html").read_text()
    assert (
        "not measured yet" not in text
        and "Time of a step: measured 2.00x" in text
        and ">20 ms</text>" in text
    )


def test_it_loads_nothing(written: tuple[Path, dict[str, float]]) -> None:
    text = written[0].read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=\s*\"(?!data:|#)|url\((?!#)|@import|https?://", text)


def test_shares() -> None:
    assert skipped_percent("32 of 112") == 71 and skipped_percent("8 of 16, 4 of 16") == 62
    assert skipped_percent("") == 0


@pytest.mark.slow
def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(slx.CompileError, match="cannot write the report"):
        slx.report(compiled(), ragged(), tmp_path / "no" / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(written: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """No console error, no request but the file; map, search, differences, keyboard; wide and
    narrow, light and dark."""
    sync_api = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            page: Any = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )
            page.set_default_timeout(180_000)  # a busy machine draws slowly
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(written[0].as_uri())
            overflow = (
                "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert page.evaluate(overflow) <= 0
            assert page.evaluate(CONTRAST) >= 4.5
            visible = "#rows tbody tr:visible"
            assert page.locator(visible).count() == 9
            page.locator("button[data-find='layers.2.mlp']").click()
            assert page.locator(visible).count() == 3
            assert page.locator("#count").inner_text() == "3 of 9 linears"
            page.locator("#search").fill("down.base")
            assert page.locator(visible).count() == 3
            page.locator("#search").fill("")
            page.locator("button[data-find]").first.focus()
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.id") == "search"
            details = page.locator("details").last
            details.locator("summary").focus()
            page.keyboard.press("Enter")
            assert details.locator("pre").is_visible()
            page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        browser.close()
    assert said == [] and {url for url in asked if not url.startswith("data:")} == {
        written[0].as_uri()
    }
