"""Hooks that put markers into a graph while it is traced, and what they read.

Dynamo guards what hooks read, not whether they are there: see docs/decisions/0005.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparselora_fx._torch import in_backward
from sparselora_fx.errors import CompileError
from sparselora_fx.ir.markers import DENSE, OBSERVED, WITHOUT_GRADIENTS
from sparselora_fx.ir.ops import OPS


class SiteAttributes(NamedTuple):
    """Names on a module: a frozen parameter, the buffers put beside it, its spec."""

    param: str
    a: str
    b: str
    statistics: tuple[str, ...]
    spec: str


# Hooks reach their inputs through this dictionary, not through a closure: Dynamo takes the shapes
# of whatever it reaches through a module for fixed, and token lists change size with every batch.
_TRACE_INPUTS: dict[int, TraceInputs] = {}
_keys = itertools.count()


class TraceInputs:
    """What hooks read while a graph is traced: the token lists of the present call."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.every = False  # token of this call is sparse, and there are no lists
        self.by_labels = False  # the batch's labels decide what this call is: sparse, dense, where
        self.padded = False  # dense sites are marked too: the lists say which tokens are no padding
        self.sliced: set[int] = set()  # ids of the weights that a graph has sliced
        self.picked: list[Tensor] = []  # which rows to observe, while the sites' specs say so
        self.labels: list[Tensor] = []  # labels and the list of tokens that carry one, to trim
        self.arguments: dict[str, Tensor] = {}  # the tensors of the present call, by name
        self.shift = True
        self.under_way = False  # a compiled call of the model has begun, and not ended
        # Ids of weights whose modules ran in plain PyTorch: inside a compiled call, and past it.
        self.eager: set[int] = set()
        self.past: set[int] = set()
        self.grad = False  # the call began with gradients: a part without them may run again
        self.caching = ""  # what becomes of a KV cache: see `caching`
        self.key = next(_keys)
        _TRACE_INPUTS[self.key] = self

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Leave a compiled call for a while: blocks run their own forwards."""
        self.under_way = False
        try:
            yield
        finally:
            self.under_way = True

    def close(self) -> None:
        """Forget these inputs; hooks that read them are gone."""
        _TRACE_INPUTS.pop(self.key, None)


def inputs_of(key: int) -> TraceInputs | None:
    """The trace inputs of a compiled model, unless that is restored."""
    return _TRACE_INPUTS.get(key)


def site_hook(key: int, marks: tuple[SiteAttributes, ...]) -> Callable[..., object]:
    """A forward pre-hook that passes a module's input through one `site` (or `observed`) marker per
    weight, while being traced."""

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if not torch.compiler.is_compiling():
            _note_eager(module, _TRACE_INPUTS.get(key), marks)
            return None
        trace_inputs = _TRACE_INPUTS[key]
        if args and isinstance(args[0], Tensor):
            return (_marked(module, args[0], trace_inputs, marks), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, name: _marked(module, value, trace_inputs, marks)}
        return None

    return hook


def _note_eager(
    module: nn.Module, trace_inputs: TraceInputs | None, marks: tuple[SiteAttributes, ...]
) -> None:
    """A marked module runs in plain PyTorch: its linears are dense in this call."""
    if trace_inputs is None:
        return
    if in_backward():
        _refuse_recomputation(module, trace_inputs, marks)
    elif module.training and torch.is_grad_enabled():
        ran = trace_inputs.eager if trace_inputs.under_way else trace_inputs.past
        ran.update(id(getattr(module, mark.param)) for mark in marks)


def _refuse_recomputation(
    module: nn.Module, trace_inputs: TraceInputs, marks: tuple[SiteAttributes, ...]
) -> None:
    """Raise where a backward pass runs a module again outside compiled code: that forward would be
    dense although the first one was sliced, and gradients silently wrong."""
    if not trace_inputs.sliced:
        return
    specs = [(getattr(module, mark[-1]), id(getattr(module, mark[0]))) for mark in marks]
    dense = (DENSE, OBSERVED)
    if any(spec not in dense and weight in trace_inputs.sliced for spec, weight in specs):
        raise CompileError(
            "a backward pass of this model runs its layers again, outside what torch.compile "
            "compiled, where they are not sliced; give those layers sparsity 0 in the plan, or "
            "switch the recomputation off"
        )


def label_hook(key: int) -> Callable[..., object]:
    """A forward pre-hook that passes a module's input through a `label_rows` marker, while being
    traced."""

    def hook(module: nn.Module, args: tuple[object, ...]) -> object:
        if not torch.compiler.is_compiling():
            return None
        trace_inputs = _TRACE_INPUTS[key]
        if not trace_inputs.labels or not args or not isinstance(args[0], Tensor):
            return None
        labels, idx, pos = trace_inputs.labels
        return (OPS.label_rows(args[0], labels, idx, pos, trace_inputs.shift), *args[1:])

    return hook


def _marked(
    module: nn.Module, x: Tensor, trace_inputs: TraceInputs, marks: tuple[SiteAttributes, ...]
) -> Tensor:
    for param, a, b, names, attribute in marks:
        spec = getattr(module, attribute)
        if spec == OBSERVED:
            if len(marks) == 1:  # of several weights it is not known which reads the input
                x = OPS.observed(x, getattr(module, param), trace_inputs.picked)
        elif spec != DENSE:
            weight = getattr(module, param)
            factor_a, factor_b = getattr(module, a), getattr(module, b)
            statistics = [getattr(module, name) for name in names]
            if trace_inputs.grad and not torch.is_grad_enabled():
                spec = WITHOUT_GRADIENTS
            x = OPS.site(x, weight, factor_a, factor_b, trace_inputs.tokens, spec, statistics)
        elif trace_inputs.padded and torch.is_grad_enabled():
            # Dense, but for padding; its factors are never read.
            weight = getattr(module, param)
            x = OPS.site(x, weight, weight, weight, trace_inputs.tokens, spec, [])
    return x
