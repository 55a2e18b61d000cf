"""A warning is given once: its text, or what it is about."""

from __future__ import annotations

import warnings

import pytest

from sparselora_fx.notices import Notices


def test_once() -> None:
    notices = Notices()
    with pytest.warns(UserWarning, match="one") as seen:
        notices.warn("one")
        notices.warn("one")
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="3 graphs"):
        notices.warn("3 graphs", about="graphs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices.warn("4 graphs", about="graphs")
    with pytest.warns(UserWarning, match="one"):
        Notices().warn("one")
