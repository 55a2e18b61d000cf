"""Keep the state of a watch beside a checkpoint, and go on from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from sparselora_fx.errors import CompileError, WatchError
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.watching import apply_levels, settle
from sparselora_fx.watch.state import WatchState


def save_watch(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what a watched model's watch has seen and where its ladder stands, as JSON.

    Args:
        model: compiled with ``watch=``.
        path: of the file; replaced atomically.

    Raises:
        CompileError: the model is not compiled, or not watched. WatchError: the file cannot be
        written.
    """
    state = _state_of(model)
    settle(get_runtime(model))
    target = Path(path)
    beside = target.with_name(f"{target.name}.part")
    try:
        beside.write_text(json.dumps(state.to_json()) + "\n", encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise WatchError(
            f"cannot write the watch's state to {str(path)!r}: {error}; choose a folder that exists"
        ) from error


def load_watch(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Go on from what `save_watch` wrote: the next probe, verdict and level are those that the run
    would have come to.

    Args:
        model: compiled with ``watch=``, with the same settings.
        path: of the file.

    Raises:
        CompileError: the model is not compiled, or not watched. WatchError: no such file, or
        nothing of the kind in it.
    """
    state = _state_of(model)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WatchError(
            f"cannot read the watch's state from {str(path)!r}: {error}; start without it"
        ) from error
    state.take(found)
    apply_levels(get_runtime(model), state)


def _state_of(model: nn.Module) -> WatchState:
    state: WatchState | None = get_runtime(model).watching
    if state is None:
        raise CompileError(
            "this model is not watched; compile it with "
            "sparselora_fx.compile(..., watch=sparselora_fx.Watch())"
        )
    return state


def watch_file(folder: str | os.PathLike[str]) -> Path:
    """Where `SparsityCallback` keeps it beside a checkpoint."""
    return Path(folder) / "sparselora_watch.json"
