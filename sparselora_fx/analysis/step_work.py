"""What one training step of a graph has to do, by the shapes of its values: nothing is computed.

Every matmul and attention product counts two FLOPs a multiply-add. Attention counts in full, as if
no causal mask saved half of it, and written out: without what a fused kernel's backward computes
again. A checkpointed block's forward counts twice. What takes time beside FLOPs is counted as well:
ops, bytes, and elements of quantised weights that are unpacked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparselora_fx import _torch
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import COLUMNS
from sparselora_fx.model.unpacking import Layout

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger(__name__)
_CHECKPOINT = "tag_activation_checkpoint"


@dataclass(frozen=True)
class GraphWork:
    """What one step of a graph has to do.

    Attributes:
        flops: all of them. choosing: those that choose channels.
        ops: calls that compute something. A compiler fuses some of them.
        traffic: bytes that ops without FLOPs read and write, were none of them fused.
        unpacked: elements of quantised weights that are made plain.
    """

    flops: int = 0
    choosing: int = 0
    ops: int = 0
    traffic: int = 0
    unpacked: int = 0

    def __add__(self, other: GraphWork) -> GraphWork:
        return GraphWork(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: GraphWork) -> GraphWork:
        return GraphWork(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


def step_work(gm: fx.GraphModule, inputs: Sequence[object]) -> GraphWork | None:
    """Count a forward and a backward; None: an op cannot run without values.

    Rule:   the graph runs on meta tensors of its inputs' sizes in the call that is traced, then the
            backward from its scalars, or, where it returns none, from all that needs a gradient.
    Sound:  each op is counted by its own formula, ours by theirs; what an op without one does
            inside counts by what it is made of, or not at all.
    """
    try:
        return _counted(gm, inputs)
    except Exception as error:  # any op of a user's graph may refuse meta tensors in its own way
        log.debug("the work of a step is not counted: %s", error)
        return None


def _counted(gm: fx.GraphModule, inputs: Sequence[object]) -> GraphWork:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    meter = _Meter(flops)
    with torch.enable_grad(), meter, flops:
        forward = _Counting(gm, meter)
        results = forward.run(*[_stand_in(held) for held in inputs])
        tensors = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]
        found = [t for t in tensors if t.requires_grad]
        roots = [t for t in found if t.dim() == 0] or found
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    return meter.work + forward.again + GraphWork(choosing=forward.choosing)


@dataclass
class _Beside:
    """What a `_Meter` counts itself."""

    flops: int = 0
    ops: int = 0
    traffic: int = 0
    unpacked: int = 0


class _Meter(TorchDispatchMode):
    """Counts what passes by, beside a counter of FLOPs that it holds."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.found = _Beside()

    @property
    def work(self) -> GraphWork:
        """All so far."""
        own = self.found
        flops = self.counter.get_total_flops() + own.flops
        return GraphWork(flops, 0, own.ops, own.traffic, own.unpacked)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        if not read or func.is_view:
            return made
        own, name, written = self.found, str(func.overloadpacket), _tensors(made)
        own.ops += 1
        if name in _UNPACKING:
            own.unpacked += _UNPACKING[name](args)
        elif func.overloadpacket not in self.counter.flop_registry:
            own.traffic += sum(t.numel() * t.element_size() for t in (*read, *written))
        if name == _FOUR_BIT_PRODUCT:
            own.flops += _product(read[0].shape, out_shape=written[0].shape)
        return made


def _tensors(held: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(held) if isinstance(t, Tensor)]


def _stand_in(held: object) -> object:
    """A meta tensor of a traced one's sizes; no leaf, as graphs write into some inputs."""
    if isinstance(held, torch.SymInt):
        return _torch.traced_size(held)
    if not isinstance(held, Tensor):
        return held
    size, stride = ([_fixed(n) for n in sizes] for sizes in (held.shape, held.stride()))
    made = torch.empty_strided(size, stride, dtype=held.dtype, device="meta")
    return made.requires_grad_().clone() if held.requires_grad else made


def _fixed(size: int | torch.SymInt) -> int:
    return _torch.traced_size(size) if isinstance(size, torch.SymInt) else size


def _on_meta(held: object) -> object:
    if isinstance(held, Tensor) and held.device.type != "meta":
        return held.to("meta")
    return torch.device("meta") if isinstance(held, torch.device) else held


class _Counting(fx.Interpreter):
    """Runs a graph under a meter; tells what its choices cost, and what is computed ``again``."""

    def __init__(self, gm: fx.GraphModule, meter: _Meter) -> None:
        super().__init__(gm)
        self.meter = meter
        self.serving = _serving(gm.graph)
        self.choosing = 0
        self.again = GraphWork()

    def run_node(self, n: fx.Node) -> object:
        if op_name(n) == _CHECKPOINT:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._run_twice(*args)
        if n not in self.serving:
            return super().run_node(n)
        before = self.meter.work
        result = super().run_node(n)
        self.choosing += (self.meter.work - before).flops
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Whatever device a node speaks of, its tensors are on "meta"."""
        args, kwargs = pytree.tree_map(_on_meta, super().fetch_args_kwargs_from_env(n))
        return args, kwargs

    def _run_twice(self, gm: fx.GraphModule, *args: object) -> object:
        """A checkpointed body: the backward runs it again, but for its choices, which are kept."""
        body = _Counting(gm, self.meter)
        before = self.meter.work
        result = body.run(*args)
        self.choosing += body.choosing
        kept = GraphWork(flops=body.choosing)
        self.again = self.again + (self.meter.work - before) - kept + body.again
        return result


def _serving(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that serve nothing but the choice of channels."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        only = bool(node.users) and all(user in found for user in node.users)
        if node.op != "placeholder" and (op_name(node) == "topk_channels" or only):
            found.add(node)
    return found


Shape = Sequence[int]


def _product(x: Shape, *_: object, out_shape: Shape = (), **__: object) -> int:
    """``x[..., K] -> y[..., N]`` by some of a matrix."""
    return 2 * prod(x) * out_shape[-1]


def _weight_gradient(gy: Shape, x: Shape, *_: object, **__: object) -> int:
    return 2 * prod(gy) * x[-1]


def _low_rank_norms(x: Shape, a: Shape, b: Shape, *_: object, **__: object) -> int:
    """``x @ b.T``, its Gram matrix, and the rows of a in that."""
    tokens, rank = prod(x[:-1]), b[0]
    return 2 * (tokens * rank * (x[-1] + rank) + a[0] * rank * rank)


def _low_rank_energy(z: Shape, a: Shape, *_: object, **__: object) -> int:
    """The Gram matrix of z, and the rows of a in that."""
    tokens, rank = prod(z[:-1]), z[-1]
    return 2 * (tokens * rank * rank + a[0] * rank * rank)


_OURS = {
    _product: (
        "sliced_linear", "sliced_linear_dgrad", "sliced_linear_in", "sliced_linear_in_dgrad",
        "packed_linear", "packed_linear_dgrad", "low_rank_linear",
    ),
    _weight_gradient: ("sliced_linear_wgrad", "sliced_linear_in_wgrad"),
    _low_rank_norms: ("low_rank_norms",),
    _low_rank_energy: ("low_rank_energy",),
}  # fmt: skip
_FORMULAS: dict[object, object] = {
    getattr(OPS, name): formula for formula, names in _OURS.items() for name in names
}


def _kept_elements(args: Sequence[object]) -> int:
    """Of `packed_linear` and its derivative: what is unpacked of the matrix."""
    *_, layout, idx, of = args
    form = Layout.decode(str(layout))
    if not isinstance(idx, Tensor):
        return form.n * form.k
    return idx.shape[0] * (form.n if of == COLUMNS else form.k)


def _all_elements(place: int) -> Callable[[Sequence[object]], int]:
    """Of an op of bitsandbytes that reads a matrix of two elements a byte at a place."""

    def elements(args: Sequence[object]) -> int:
        packed = args[place]
        assert isinstance(packed, Tensor)
        return 2 * packed.numel() * packed.element_size()

    return elements


_FOUR_BIT_PRODUCT = "bitsandbytes.gemm_4bit"
_UNPACKING: dict[str, Callable[[Sequence[object]], int]] = {
    "sparselora.packed_linear": _kept_elements,
    "sparselora.packed_linear_dgrad": _kept_elements,
    _FOUR_BIT_PRODUCT: _all_elements(1),
    "bitsandbytes.dequantize_4bit": _all_elements(0),
}
