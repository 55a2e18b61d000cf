"""What tests share: padded batches."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.token_batches import IGNORED
from tests.support.token_batches import ragged as ragged_prompts


def ragged(*shape: int, **options: Any) -> dict[str, Any]:
    """As for all tests, but that no padding predicts a label: it would have to be computed."""
    data = ragged_prompts(*shape, **options)
    behind = data["attention_mask"].cumsum(dim=1) > 1
    data["labels"] = torch.where(behind, data["labels"], IGNORED)
    return data
