"""Keep torch from telling users of what this package does on its own."""

from __future__ import annotations

import logging
from functools import cache


@cache
def quieten() -> None:
    """Drop torch's remark on the context function that saves selections: the user passed none."""
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_OurContexts())


class _OurContexts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
