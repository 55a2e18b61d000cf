"""A sparse step that breaks is taken dense: training goes on, and says so.

What can break is beyond a model's own code: a graph that the compiler cannot compile, memory that
is full at a new shape, a cache that cannot be read, compilation without end. Not caught: errors
that the dense step has too (they are the user's), and typed errors. See docs/decisions/0019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparselora_fx.errors import BackwardError, CompileError, SparseLoraError
from sparselora_fx.model.preserve import ChangingBuffers, RandomState
from sparselora_fx.notices import Notices
from sparselora_fx.runtime.backward_hooks import on_backward

FAILURES = 3  # kinds of calls that broke, before no step is tried sparse any more
STORM = 32  # calls of one kind that compiled again, before nothing more is compiled
_HEARD = "sparselora_fx.explain(model) counts them; compile(..., strict=True) raises instead"


class NotFinite(Exception):
    """A watched sparse step's loss is not finite, and its dense loss is. The watch has lowered what
    is at fault, so steps of its kind may be sparse again."""


@dataclass
class Safety:
    """What broke in sparse steps of one compiled model, and what is not tried again.

    Attributes:
        strict: raise what breaks, instead of taking the step dense.
        dense: the step under way is taken dense.
        broken: how many steps broke, by what broke.
        plain: how many steps ran in plain PyTorch, as compilation had no end.
        avoided: the kinds of calls that are not tried sparse again.
        uncompiled: nothing more is compiled: steps run the model's own forward.
        backwards: the kinds of sparse calls whose backward has begun, and not ended.
    """

    strict: bool = False
    dense: bool = False
    broken: Counter[str] = field(default_factory=Counter)
    plain: int = 0
    avoided: set[Hashable] = field(default_factory=set)
    uncompiled: bool = False
    backwards: list[Hashable] = field(default_factory=list)
    buffers: ChangingBuffers = field(default_factory=ChangingBuffers)
    notices: Notices = field(default_factory=Notices)
    result: object = None  # of the attempt under way

    @property
    def off(self) -> bool:
        """Whether no step is tried sparse any more."""
        return self.uncompiled or len(self.avoided) >= FAILURES

    def run(
        self,
        attempt: Callable[[], object],
        plain: Callable[[], object],
        kind: Hashable,
        before: RandomState,
        is_sparse: Callable[[], bool],
    ) -> object:
        """One training step: sparse if that works, else dense and compiled, else dense and plain.

        Args:
            attempt: the compiled step; reads `dense`. plain: the model's own forward.
            kind: of the call: what breaks once is not tried again with the same kind.
            before: random numbers as they stand; a second attempt begins with the same.
            is_sparse: whether the attempt that was made last is a sparse step.
        """
        if self.uncompiled:
            self.plain += 1
            return plain()
        self.dense = kind in self.avoided or self.off
        try:
            error = self._tried(attempt)
            if error is None:
                if is_sparse():
                    self._follow(kind)
                return self.result
            mended = isinstance(error, NotFinite)
            if self.strict or not (mended or is_sparse()):
                raise error
            what = _described(error)
            del error  # it holds the frames of the step, and their memory
            _free()
            self._put_back(before)
            self.dense = True
            if self._tried(attempt) is not None:
                self._put_back(before)
                self.result = plain()  # what this raises is the user's
            self._note(what, None if mended else kind)
            return self.result
        finally:
            self.buffers.forget()
            self.dense, self.result = False, None

    def ahead(self, compile_ahead: Callable[[], None]) -> None:
        """Compile ahead of need; what breaks will break again, or not, when it is needed."""
        try:
            compile_ahead()
        except Exception as error:
            if self.strict or _is_users(error):
                raise
            self._note(f"compiling ahead: {_described(error)}", None)

    def begin(self, model: nn.Module, ours: Iterable[Tensor]) -> None:
        """A training call begins: keep what a second attempt must find again.

        Raises:
            BackwardError: the backward of an earlier sparse call broke, and left gradients behind.
        """
        broke, self.backwards = self.backwards, []
        if broke:
            self.avoided.update(broke)
            self.broken["an error in its backward"] += len(broke)
        if broke and _have_gradients(model.parameters()):
            raise BackwardError(
                "the backward of the latest sparse step raised before it was done, and .grad holds "
                "the part of its gradients that was made. Steps of that kind are DENSE from now "
                "on. What to do: optimizer.zero_grad(), then repeat the step from its first "
                "micro-batch"
            )
        if broke:
            self.notices.warn(
                "the backward of a sparse step raised; steps of that kind are DENSE from now on",
                about="a backward broke",
            )
        if not self.uncompiled:
            self.buffers.keep(model, ours)

    def _follow(self, kind: Hashable) -> None:
        """Notice if the backward of a sparse call raises: autograd has no way to take it dense."""
        begin, end = (lambda: self.backwards.append(kind)), (lambda: self._ended(kind))
        on_backward(self.result, end, begin)

    def _ended(self, kind: Hashable) -> None:
        if kind in self.backwards:
            self.backwards.remove(kind)

    def _put_back(self, before: RandomState) -> None:
        before.put()
        self.buffers.put()

    def _tried(self, attempt: Callable[[], object]) -> Exception | None:
        """Run an attempt: None and its result in `result`, or what broke."""
        try:
            self.result = attempt()
        except Exception as error:
            if _is_users(error):
                raise
            return error
        return None

    def _note(self, what: str, kind: Hashable) -> None:
        self.broken[what] += 1
        if kind is not None:
            self.avoided.add(kind)
        self.notices.warn(
            f"a sparse step broke and was taken DENSE: {what}. Training goes on; steps of this "
            f"kind stay dense, and after {FAILURES} kinds all do. {_HEARD}",
            about="a sparse step broke",
        )

    def note_recompiles(self, most: int) -> None:
        """``most``: how often one kind of call compiled again. Too often is a storm: nothing more
        is compiled."""
        if most < STORM or self.uncompiled:
            return
        if self.strict:
            raise CompileError(
                f"one kind of step was compiled again {most} times; the warning about recompiles "
                "says what changes from call to call. Keep it fixed, or leave strict=True out"
            )
        self.uncompiled = True
        self.notices.warn(
            f"one kind of step was compiled again {most} times, so nothing more is compiled: all "
            "further steps are DENSE and run in plain PyTorch. The warning about recompiles says "
            "what changes from call to call; keep it fixed and call sparselora_fx.compile again",
            about="recompile storm",
        )

    def describe(self) -> str:
        """One line for `explain`; empty if nothing broke."""
        parts = [f"{what} ({count})" for what, count in self.broken.most_common()]
        total = sum(self.broken.values())
        lines = [f"{total} sparse steps broke: {'; '.join(parts)}"] if total else []
        if self.uncompiled:
            lines.append(f"{self.plain} steps ran in plain PyTorch, as compiling had no end")
        elif self.off:
            lines.append("no step is tried sparse any more")
        return f"fail-safe: {'; '.join(lines)}" if lines else ""


def _is_users(error: Exception) -> bool:
    """Whether an error is one that a dense step would not mend."""
    return isinstance(_cause(error), SparseLoraError)


def _cause(error: Exception) -> Exception:
    """What a compiler's error wraps."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, Exception) else error


def _described(error: Exception) -> str:
    cause = _cause(error)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


def _have_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in parameters)


def _free() -> None:
    """Give memory back that a broken step held: it may be what was missing."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def shapes_of(values: Iterable[object]) -> Hashable:
    """What tells kinds of calls apart: the sizes of their tensors."""
    return tuple(tuple(v.shape) for v in values if isinstance(v, Tensor))
