"""What `propagate` says of graphs that are built from one linear."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support.small_graphs import Small, after

Build = Callable[[Small, fx.Node], Any]
ROWS = 12


def flow(*builds: Build) -> tuple[list[Any], Rewrite]:
    """The values that `propagate` gives what is built from a linear ``[2, 3, 12]``."""
    small = Small()
    y = small.site(small.input("x", 2, 3, 8), "w", ROWS)
    ends = [build(small, y) for build in builds]
    rewrite = small.rewrite(*ends)
    after(rewrite, find_sites)
    values = propagate(rewrite.graph, rewrite.sites)
    return [values.get(end) for end in ends], rewrite


def part(*key: Any) -> Build:
    return lambda s, y: s.call(operator.getitem, y, key)
