"""Hooks that put markers into a graph while it is traced, and what they read.

Dynamo guards what hooks read, not whether they are there: see docs/decisions/0005.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparselora_fx._torch import in_backward
from sparselora_fx.errors import CompileError
from sparselora_fx.ops import OPS
from sparselora_fx.regions import DENSE, WITHOUT_GRADIENTS


class Mark(NamedTuple):
    """Names on a module: a frozen parameter, the buffers put beside it, its spec."""

    param: str
    a: str
    b: str
    known: tuple[str, ...]
    spec: str


OBSERVED = "observed"  # the spec of a site that is dense now, and whose input is observed

# Hooks reach their phase through this dictionary, not through a closure: Dynamo takes the shapes of
# whatever it reaches through a module for fixed, and token lists change size with every batch.
_PHASES: dict[int, Phase] = {}
_keys = itertools.count()


class Phase:
    """What hooks read while a graph is traced: the token lists of the present call."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.padded = False  # dense sites are marked too: the lists say which tokens are no padding
        self.sliced: set[int] = set()  # ids of the weights that a graph has sliced
        self.picked: list[Tensor] = []  # which rows to observe, while the sites' specs say so
        self.labels: list[Tensor] = []  # labels and the list of tokens that carry one, to trim
        self.arguments: dict[str, Tensor] = {}  # the tensors of the present call, by name
        self.shift = True
        self.inside = False  # a compiled call of the model is under way
        # Ids of weights whose modules ran in plain PyTorch: inside a compiled call, and past it.
        self.eager: set[int] = set()
        self.past: set[int] = set()
        self.grad = False  # the call began with gradients: a part without them may run again
        self.caching = ""  # what becomes of a KV cache: see `caching`
        self.key = next(_keys)
        _PHASES[self.key] = self

    def close(self) -> None:
        """Forget the phase; hooks that read it are gone."""
        _PHASES.pop(self.key, None)


def phase_of(key: int) -> Phase | None:
    """The phase of a compiled model, unless that is restored."""
    return _PHASES.get(key)


def site_hook(key: int, marks: tuple[Mark, ...]) -> Any:
    """A forward pre-hook that passes a module's input through one `site` (or `observed`) marker per
    weight, while being traced."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():
            _note_eager(module, _PHASES.get(key), marks)
            return None
        phase = _PHASES[key]
        if args and isinstance(args[0], Tensor):
            return (_marked(module, args[0], phase, marks), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, name: _marked(module, value, phase, marks)}
        return None

    return hook


def _note_eager(module: nn.Module, phase: Phase | None, marks: tuple[Mark, ...]) -> None:
    """A marked module runs in plain PyTorch: its linears are dense in this call."""
    if phase is None:
        return
    if in_backward():
        _refuse_recomputation(module, phase, marks)
    elif module.training and torch.is_grad_enabled():
        ran = phase.eager if phase.inside else phase.past
        ran.update(id(getattr(module, mark.param)) for mark in marks)


def _refuse_recomputation(module: nn.Module, phase: Phase, marks: tuple[Mark, ...]) -> None:
    """Raise where a backward pass runs a module again outside compiled code: that forward would be
    dense although the first one was sliced, and gradients silently wrong."""
    if not phase.sliced:
        return
    words = [(getattr(module, mark[-1]), id(getattr(module, mark[0]))) for mark in marks]
    dense = (DENSE, OBSERVED)
    if any(spec not in dense and weight in phase.sliced for spec, weight in words):
        raise CompileError(
            "a backward pass of this model runs its layers again, outside what torch.compile "
            "compiled, where they are not sliced; give those layers sparsity 0 in the plan, or "
            "switch the recomputation off"
        )


def label_hook(key: int) -> Any:
    """A forward pre-hook that passes a module's input through a `label_rows` marker, while being
    traced."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not torch.compiler.is_compiling():
            return None
        phase = _PHASES[key]
        if not phase.labels or not args or not isinstance(args[0], Tensor):
            return None
        labels, idx, pos = phase.labels
        return (OPS.label_rows(args[0], labels, idx, pos, phase.shift), *args[1:])

    return hook


def _marked(module: nn.Module, x: Tensor, phase: Phase, marks: tuple[Mark, ...]) -> Tensor:
    for param, a, b, names, spec in marks:
        words = getattr(module, spec)
        if words == OBSERVED:
            if len(marks) == 1:  # of several weights it is not known which reads the input
                x = OPS.observed(x, getattr(module, param), phase.picked)
        elif words != DENSE:
            weight = getattr(module, param)
            factor_a, factor_b = getattr(module, a), getattr(module, b)
            known = [getattr(module, name) for name in names]
            if phase.grad and not torch.is_grad_enabled():
                words = WITHOUT_GRADIENTS
            x = OPS.site(x, weight, factor_a, factor_b, phase.tokens, words, known)
        elif phase.padded and torch.is_grad_enabled():
            # Dense, but for padding; its factors are never read.
            weight = getattr(module, param)
            x = OPS.site(x, weight, weight, weight, phase.tokens, words, [])
    return x
