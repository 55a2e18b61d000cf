"""Replay compiled graphs, forward and backward, as CUDA graphs.

A compiled graph launches its kernels from Python, a thousand and more in a step; a CUDA graph
launches them at once. It runs on the memory and at the sizes that it was captured with. So
parameters, buffers and factors are read where they are, batches and token lists are copied to where
the capture found them, and each combination of sizes has a capture of its own (token lists come in
few lengths: `capacities`).

What is captured is the whole compiled graph, pieces and all, as one function; its backward by
running autograd while capturing. Every capture of a model shares one pool of memory, in which a
forward's results live until the next forward. Hence two rules: a call whose forerunner still waits
for its backward runs as usual; and a backward that the capture does not answer (gradients of other
outputs, a second backward) computes its forward again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, fx, nn

from sparselora_fx.compiler.capacities import Capacities, Lengths
from sparselora_fx.compiler.capture_engine import CudaEngine, Engine
from sparselora_fx.compiler.captures import Capture, Pool, replayed, tensors_at
from sparselora_fx.compiler.replay_check import replays_differently
from sparselora_fx.environment import disabled_layers
from sparselora_fx.errors import CompileError
from sparselora_fx.notices import Notices

Function = Callable[..., object]
_SMALL = 32  # calls in a graph: with fewer it is left as it is
_CALLS = 3  # as usual at each combination of sizes, before it is captured
_CAPTURES = 12  # of one compiled graph
_SIZES = 48  # combinations of a compiled graph; with more, batches are too unlike each other


class CudaGraphs:
    """The CUDA graphs of one compiled model.

    Attributes:
        allowed: the present call is one to replay, or to learn from.
        used: some graph may be captured.
        reason: why a call last ran as usual.
    """

    def __init__(self, model: nn.Module, engine: Engine, *, demanded: bool = False) -> None:
        self.model = model
        self.pool = Pool(engine)
        self.demanded = demanded
        self.allowed = False
        self.used = False
        self.captures = self.usual = 0
        self.reason = ""
        self.notices = Notices()
        self.capacities: dict[tuple[int, ...], Capacities] = {}

    def is_small(self, gm: fx.GraphModule) -> bool:
        """Whether a graph is too small to gain by a capture. A graph break leaves such a graph in
        front of the one that matters, which would then run as usual: it may not be replayed while
        another one's backward is due."""
        graphs = (part.graph for part in gm.modules() if isinstance(part, fx.GraphModule))
        calls = [node for graph in graphs for node in graph.nodes if node.op.startswith("call")]
        return len(calls) < _SMALL

    def wrap(self, compiled: Function, inputs: Sequence[object], extra: int) -> Function:
        """A compiled graph that is replayed where that can be done. The last ``extra`` of its
        outputs are read before its next call."""
        devices = {x.device.type for x in inputs if isinstance(x, Tensor)}
        self.used |= self.pool.engine.device in devices
        if devices != {self.pool.engine.device}:
            if self.used or self.demanded:
                self.refuse(f"a graph's inputs are on {' and '.join(sorted(devices)) or 'nothing'}")
            return compiled
        return Replayed(compiled, extra, self)

    def lengths(self, grid: Sequence[int], wanted: Lengths, device: torch.device) -> Lengths:
        """How long the token lists of a call are to be."""
        if device.type != self.pool.engine.device or not self.allowed or not wanted:
            return wanted
        key = (*grid, len(wanted))
        if key not in self.capacities and len(self.capacities) >= _SIZES:
            return self._exact(wanted, _UNLIKE)
        chosen = self.capacities.setdefault(key, Capacities()).choose(wanted)
        if chosen is None:
            return self._exact(wanted, "its token lists had lengths that no class held")
        return chosen

    def _exact(self, wanted: Lengths, reason: str) -> Lengths:
        self.allowed = False
        self.usual += 1
        self.reason = reason
        return wanted

    def refuse(self, reason: str) -> None:
        """Note why a call runs as usual; say so, once, if captures were asked for."""
        self.reason = reason
        if self.demanded:
            text = f"cuda_graphs=True: a step runs as usual, because {reason}"
            self.notices.warn(text, about="cuda graphs")

    def describe(self) -> str:
        """One line for `explain`."""
        said = f"CUDA graphs: {self.captures} captured, {self.pool.forwards} calls replayed"
        if self.reason:
            said += f", {self.usual} run as usual (the last one because {self.reason})"
        return said


def cuda_graphs_of(
    model: nn.Module, wanted: bool | str, *, backend: str, regional: bool
) -> CudaGraphs | None:
    """What ``compile(..., cuda_graphs=wanted)`` asks for; None: nothing is captured.

    Raises:
        CompileError: another word, or True beside what cannot be captured.
    """
    if wanted not in (True, False, "auto"):
        raise CompileError(f"cuda_graphs must be True, False or 'auto', got {wanted!r}")
    if wanted is True and (regional or backend == "eager"):
        what = "regional=True (each block is a graph of its own)" if regional else "backend='eager'"
        raise CompileError(f"cuda_graphs=True does not go with {what}; leave one of them out")
    off = wanted is False or "cuda_graphs" in disabled_layers()
    if off or regional or (wanted == "auto" and backend != "inductor"):
        return None
    return CudaGraphs(model, CudaEngine(), demanded=wanted is True)


_UNLIKE = (
    "batches have too many sizes; pad them to a few (pad_to_multiple_of, or one length for all)"
)
_WAITING = (
    "what was replayed before it still waits for its backward (two forwards, or a graph break)"
)


class _Sizes:
    """What is known of one combination of sizes: how often it came, which outputs a loss was made
    of, and its capture."""

    def __init__(self) -> None:
        self.calls = 0
        self.used: set[int] = set()
        self.capture: Capture | None = None


class Replayed:
    """A compiled graph, replayed at the sizes that keep coming."""

    def __init__(self, compiled: Function, extra: int, graphs: CudaGraphs) -> None:
        self.compiled = compiled
        self.extra = extra
        self.graphs = graphs
        self.sizes: dict[Hashable, _Sizes] = {}
        self.moving: list[int] | None = None  # inputs other than parameters and buffers
        self.held: list[int] = []  # the others
        self.off = False

    def __call__(self, *args: object) -> object:
        graphs = self.graphs
        if not graphs.allowed or not torch.is_grad_enabled():
            return self.compiled(*args)
        if self.off:
            return self._as_usual(args, graphs.reason)
        if graphs.pool.waits():
            return self._as_usual(args, _WAITING)
        known = self._known(args)
        if known is None:
            self.off = True
            return self._as_usual(args, graphs.reason)
        if known.calls < _CALLS or not known.used:
            known.calls += 1
            return self._watched(args, known)
        if known.capture is None and not self._capture(args, known):
            return self._as_usual(args, graphs.reason)
        assert known.capture is not None
        return replayed(known.capture, args, graphs.pool)

    def _as_usual(self, args: tuple[object, ...], reason: str) -> object:
        self.graphs.usual += 1
        self.graphs.refuse(reason)
        return self.compiled(*args)

    def _known(self, args: tuple[object, ...]) -> _Sizes | None:
        """What is known of the sizes of a call; None if there are too many."""
        if self.moving is None:
            model = self.graphs.model
            ids = {id(t) for t in (*model.parameters(), *model.buffers())}
            self.held = [i for i, a in enumerate(args) if id(a) in ids]
            self.moving = sorted(set(range(len(args))) - set(self.held))
        where = tuple([held.data_ptr() for held in tensors_at(args, self.held)])
        key = (where, tuple([_key(args[i]) for i in self.moving]))
        if key not in self.sizes:
            if len(self.sizes) >= _SIZES:
                self.graphs.refuse(_UNLIKE)
                return None
            self.sizes[key] = _Sizes()
        return self.sizes[key]

    def _watched(self, args: tuple[object, ...], known: _Sizes) -> object:
        """A call as usual that tells which outputs gradients come for."""
        outputs = self.compiled(*args)
        assert isinstance(outputs, tuple | list)
        for place, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                output.register_hook(_noting(known.used, place))
        return outputs

    def _capture(self, args: tuple[object, ...], known: _Sizes) -> bool:
        """Capture a call, if it can be; else its graph runs as usual from now on."""
        graphs = self.graphs
        if sum(sizes.capture is not None for sizes in self.sizes.values()) >= _CAPTURES:
            graphs.refuse(f"{_CAPTURES} sizes are captured already")
            return False
        assert self.moving is not None
        try:
            found = Capture(self.compiled, self.extra, graphs.pool.engine, sorted(known.used))
            if not graphs.pool.engine.has_room():
                raise RuntimeError("a step's memory would be needed twice, and is not there")
            found.record(args, self.moving)
            if replays_differently(found, args):
                raise RuntimeError("its replay differs from the call itself")
        except Exception as error:  # whatever an operation raises that cannot be captured
            self.off = True
            graphs.refuse(f"it cannot be captured: {type(error).__name__}: {_first_line(error)}")
            return False
        known.capture = found
        graphs.captures += 1
        return True


def _noting(used: set[int], place: int) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        used.add(place)

    return note


def _key(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
