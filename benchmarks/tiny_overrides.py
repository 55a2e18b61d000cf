"""What the general rules of `tiny_models` cannot know: fields of single configurations."""

from __future__ import annotations

from typing import Any

# model type, or "task/model type" -> fields; a nested configuration is a nested dict.
OVERRIDES: dict[str, dict[str, Any]] = {}
