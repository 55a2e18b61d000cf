"""A long compilation says so; a short one is silent."""

from __future__ import annotations

import time

import pytest

from sparselora_fx.compiler import patience


def test_a_long_wait_is_told_twice(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "AFTER", 0.05)
    with pytest.raises(ValueError, match="x"), patience.told_if_slow("compiling"):
        time.sleep(0.3)
        raise ValueError("x")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "sparselora_fx: compiling ..."
    assert lines[1].startswith("sparselora_fx: compiling: ") and len(lines) == 2


def test_a_short_wait_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with patience.told_if_slow("compiling"):
        pass
    assert capfd.readouterr().err == ""
