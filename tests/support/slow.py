"""One value of a parametrised test that only `make test-slow` runs."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A set of arguments marked `slow`: its like runs in `make test`."""
    return pytest.param(*values, marks=pytest.mark.slow)
