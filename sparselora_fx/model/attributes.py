"""The names of all that is put on a user's modules, made in one place.

Everything begins with ``_sparselora_``, stands in a module's ``__dict__`` or among its
non-persistent buffers, and never enters a ``state_dict``.
"""

from __future__ import annotations

OURS = "_sparselora_stands_in"  # on what stands on a module in place of one of its methods
RUNTIME = "_sparselora_fx"  # on a compiled model: its `Runtime`
REPLACED = "_sparselora_replaced"  # on our `compute_loss`: what stood on the Trainer before


def buffer_name(param: str, what: str) -> str:
    """The buffer beside a frozen parameter that holds a factor ("a", "b") or a statistic of it."""
    return f"_sparselora_{what}_{param}"


def spec_name(param: str) -> str:
    """The attribute that says how sparse a frozen parameter is now (`ir.markers`)."""
    return f"_sparselora_spec_{param}"
