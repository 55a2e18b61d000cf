"""FLOPs of one training step of a graph, by the shapes of its values: nothing is computed.

Every matmul and attention product counts two FLOPs a multiply-add; pointwise work and gathers
count nothing. Attention counts in full, as if no causal mask saved half of it, and written out:
without what a fused kernel's backward computes again. A checkpointed block's forward counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparselora_fx import _torch
from sparselora_fx.graph.nodes import op_name
from sparselora_fx.ir.ops import OPS

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger(__name__)
_CHECKPOINT = "tag_activation_checkpoint"


@dataclass(frozen=True)
class GraphFlops:
    """FLOPs of one step of a graph: all, and those of them that choose channels."""

    total: int = 0
    choosing: int = 0

    def __add__(self, other: GraphFlops) -> GraphFlops:
        return GraphFlops(self.total + other.total, self.choosing + other.choosing)


def step_flops(gm: fx.GraphModule, inputs: Sequence[object]) -> GraphFlops | None:
    """Count a forward and a backward; None: an op cannot run without values.

    Rule:   the graph runs on meta tensors of its inputs' sizes in the call that is traced, then the
            backward from its scalars, or, where it returns none, from all that needs a gradient.
    Sound:  each op is counted by its own formula, ours by theirs; what an op without one does
            inside counts by what it is made of, or not at all.
    """
    try:
        return _counted(gm, inputs)
    except Exception as error:  # any op of a user's graph may refuse meta tensors in its own way
        log.debug("FLOPs are not counted: %s", error)
        return None


def _counted(gm: fx.GraphModule, inputs: Sequence[object]) -> GraphFlops:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        forward = _Counting(gm, counter)
        results = forward.run(*[_stand_in(held) for held in inputs])
        tensors = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]
        found = [t for t in tensors if t.requires_grad]
        roots = [t for t in found if t.dim() == 0] or found
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    return GraphFlops(counter.get_total_flops() + forward.again, forward.choosing)


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
    """Runs a graph under a counter; tells what its choices cost, and what is computed ``again``."""

    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.counter = counter
        self.serving = _serving(gm.graph)
        self.choosing = self.again = 0

    def run_node(self, n: fx.Node) -> object:
        if op_name(n) == _CHECKPOINT:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._run_twice(*args)
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        if n in self.serving:
            self.choosing += self.counter.get_total_flops() - before
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Whatever device a node speaks of, its tensors are on "meta"."""
        args, kwargs = pytree.tree_map(_on_meta, super().fetch_args_kwargs_from_env(n))
        return args, kwargs

    def _run_twice(self, gm: fx.GraphModule, *args: object) -> object:
        """A checkpointed body: the backward runs it again, but for its choices, which are kept."""
        body = _Counting(gm, self.counter)
        before = self.counter.get_total_flops()
        result = body.run(*args)
        self.choosing += body.choosing
        self.again += self.counter.get_total_flops() - before - body.choosing + body.again
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
        "packed_linear", "packed_linear_dgrad",
    ),
    _weight_gradient: ("sliced_linear_wgrad", "sliced_linear_in_wgrad"),
    _low_rank_norms: ("low_rank_norms",),
    _low_rank_energy: ("low_rank_energy",),
}  # fmt: skip
_FORMULAS: dict[object, object] = {
    getattr(OPS, name): formula for formula, names in _OURS.items() for name in names
}
