"""Notice that a model is compiled again and again, or no longer compiled, and say so once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparselora_fx import _torch
from sparselora_fx.notices import Notices

_PATIENCE = 4  # a second length and a batch of one row are a recompile each; nothing else should be
_SIZES = (
    "leave dynamic= out of sparselora_fx.compile or pass dynamic=True, or pad batches to a few "
    "lengths (pad_to_multiple_of=64 in transformers' collators)"
)
_VALUES = "pass the same kind of argument in every call"
_ELSEWHERE = (
    "keep what the model reads fixed (numbers and flags on its modules, global settings, its "
    "parameters' requires_grad)"
)


@dataclass
class Recompiles:
    """What one compiled model was called with, and the calls that had to compile again.

    Attributes:
        graphs: how many graphs the backend was asked for.
        reason: why the latest of them did not fit earlier ones, in torch's words.
        last: by kind of call, what the latest one passed, by argument.
        again: by kind of call, how many calls compiled although one of their kind had run before.
    """

    graphs: int = 0
    reason: str = ""
    last: dict[Hashable, dict[str, str]] = field(default_factory=dict)
    again: Counter[Hashable] = field(default_factory=Counter)
    notices: Notices = field(default_factory=Notices)

    def compiling(self) -> None:
        """Note that the backend is asked for a graph."""
        self.graphs += 1
        self.reason = _torch.recompile_reason() or self.reason

    @contextlib.contextmanager
    def watching(self, kind: Hashable, arguments: Mapping[str, object]) -> Iterator[None]:
        """Watch one compiled call.

        Args:
            kind: what this package itself compiles apart (dense and sparse calls, say): the first
                call of a kind is no recompile.
            arguments: those of the call, by name.
        """
        graphs, refused = self.graphs, _torch.refused_compilations()
        yield
        if _torch.refused_compilations() > refused:
            self._warn_of_the_limit()
        passed = {name: _described(value) for name, value in arguments.items()}
        earlier = self.last.get(kind)
        self.last[kind] = passed
        if earlier is None or self.graphs == graphs:
            return
        self.again[kind] += 1
        if self.again[kind] >= _PATIENCE:
            self._warn_of_recompiles(self.again[kind], earlier, passed)

    def _warn_of_recompiles(
        self, times: int, earlier: Mapping[str, str], passed: Mapping[str, str]
    ) -> None:
        changed, remedy = _change(earlier, passed)
        what = "; ".join(changed) or "nothing in the call's arguments"
        self.notices.warn(
            f"the model was compiled again {times} times, and each time a step waited for the "
            f"compiler. What changed the last time: {what}. {_in_torchs_words(self.reason)}"
            f"What to do: {remedy}",
            about="recompiles",
        )

    def _warn_of_the_limit(self) -> None:
        self.notices.warn(
            "torch compiles no more graphs for this model: it has reached its limit of recompiles."
            " From now on, calls that fit no compiled graph run uncompiled, and DENSE. "
            f"{_in_torchs_words(self.reason)}What to do: remove what changes from call to call "
            '(TORCH_LOGS="recompiles" lists it) and call sparselora_fx.compile again, in a fresh '
            "process or after torch.compiler.reset()",
            about="the limit of recompiles",
        )


def _described(value: object) -> str:
    """An argument, as far as a compiler looks at it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return f"a {type(value).__name__}"


def _change(earlier: Mapping[str, str], passed: Mapping[str, str]) -> tuple[list[str], str]:
    """How two calls differ, in words, and what to do about it."""
    names = [n for n in {**earlier, **passed} if earlier.get(n) != passed.get(n)]
    changed = [f"{n} from {earlier.get(n, 'absent')} to {passed.get(n, 'absent')}" for n in names]
    pairs = [(earlier.get(n, ""), passed.get(n, "")) for n in names]
    remedies = [_SIZES if all("[" in side for side in pair) else _VALUES for pair in pairs]
    return changed, ", and ".join(dict.fromkeys(remedies)) or _ELSEWHERE


def _in_torchs_words(reason: str) -> str:
    return f"In torch's words: {' '.join(reason.split())}. " if reason else ""
