"""Every relative link of the pages leads to a file, and every anchor to a heading; the site has
every page."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.support.source_tree import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from their words."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.strip().replace(" ", "-"))
    return found


def broken(page: Path) -> list[str]:
    bad = []
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            bad.append(f"{page.relative_to(ROOT)}: {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            bad.append(f"{page.relative_to(ROOT)}: {link}: no such heading")
    return bad


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 20
    assert not [bad for page in PAGES for bad in broken(page)]


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = ROOT / "docs" / "index.md"
    copy = page.parent / "__broken_for_a_test.md"
    copy.write_text("[a](nowhere.md) [b](policies.md#no-such) [c](https://x.org)", encoding="utf-8")
    try:
        assert len(broken(copy)) == 2
    finally:
        copy.unlink()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"])))
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    assert shown == pages


def test_the_api_page_has_every_public_name() -> None:
    import sparselora_fx

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    errors = {name for name in sparselora_fx.__all__ if name.endswith("Error")}
    assert set(sparselora_fx.__all__) - errors <= listed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "sparselora_fx.user.explain.explain" in page
