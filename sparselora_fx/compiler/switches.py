"""Leave passes out by name, to find the one that is to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparselora_fx.environment import DISABLED_PASSES, disabled_layers, disabled_passes
from sparselora_fx.errors import CompileError
from sparselora_fx.passes import NEEDED, ONLINE_CALIBRATION, PIPELINE, WHOLE_GRAPH

Step = TypeVar("Step", bound=Callable[..., int])


def check_switches() -> frozenset[str]:
    """The passes that ``SPARSELORA_DISABLED_PASSES`` leaves out, by their exact names.

    Raises `CompileError` for a name that no pass has, for a pass that others need, and for a layer
    of ``SPARSELORA_DISABLED_LAYERS`` that there is not.
    """
    disabled_layers()
    asked = frozenset(disabled_passes())
    known = [step.__name__ for step in (*WHOLE_GRAPH, *PIPELINE, *ONLINE_CALIBRATION)]
    for name in sorted(asked):
        if name not in known:
            allowed = ", ".join(dict.fromkeys(n for n in known if n not in NEEDED))
            raise CompileError(f"{DISABLED_PASSES} names {name!r}; passes that may go: {allowed}")
        if name in NEEDED:
            raise CompileError(
                f"{DISABLED_PASSES} names {name!r}, which cannot be left out: {NEEDED[name]}"
            )
    return asked


def switched_on(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The passes of a pipeline that are not left out; raises as `check_switches` does."""
    off = check_switches()
    return tuple(step for step in steps if step.__name__ not in off)
