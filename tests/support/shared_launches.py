"""A CPU that is taken for a device on which launches are to be few."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from sparselora_fx import environment


def shared_launches() -> Any:
    """Inside, or in a function that this decorates, launches are few, as on a GPU."""
    return patch.object(environment, "shares_launches", lambda device: True)
