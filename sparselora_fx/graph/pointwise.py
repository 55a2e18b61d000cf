"""Whether a call is pointwise: asked of PyTorch's own operator library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparselora_fx.graph.nodes import op_name, tensor, value

_TRANSPARENT = {
    "aten::detach", "aten::alias", "aten::_to_copy", "aten::clone", "aten::expand", "aten::view",
    "aten::lift_fresh", "aten::unsqueeze", "aten::scalar_tensor", "aten::full",
}  # fmt: skip
# Pointwise, although PyTorch does not tag them so.
_UNTAGGED = {"aten::hardswish", "aten::log_sigmoid_forward", "aten::_prelu_kernel"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def is_pointwise(node: fx.Node) -> bool:
    """Whether a call computes each output element from the matching input elements alone.

    Asked of the operator library itself: the call is run on tiny meta tensors, and every ATen op it
    dispatches to must carry ``torch.Tag.pointwise``. So any user-written function of such ops is
    recognised, without a table.
    """
    if _applies_function(node):
        return _has_pointwise_bodies(node)
    first = node.args[0] if node.args else None
    if op_name(node) == "getitem" and isinstance(first, fx.Node) and _applies_function(first):
        return _has_pointwise_bodies(first)
    result = tensor(node)
    if node.op not in ("call_function", "call_method") or result is None:
        return False
    inputs = [t for n in node.all_input_nodes if (t := tensor(n)) is not None]
    if not inputs or max(t.dim() for t in inputs) != result.dim():
        return False
    try:
        ops = _dispatched(node)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        return False  # not callable on tiny shapes: whatever it is, it is not pointwise
    return bool(ops) and all(_is_elementwise(op) for op in ops)


def _applies_function(node: fx.Node) -> bool:
    """Whether a node applies a user's `torch.autograd.Function` (its results are a tuple)."""
    return op_name(node) == "autograd_function_apply"


def _has_pointwise_bodies(node: fx.Node) -> bool:
    """Whether both graphs of an applied function, forward and backward, are pointwise."""
    owner = node.graph.owning_module
    held = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    graphs = [getattr(owner, str(attr.target), None) for attr in held]
    return len(graphs) == 2 and all(
        isinstance(graph, fx.GraphModule) and all(map(_is_harmless, graph.graph.nodes))
        for graph in graphs
    )


def _is_harmless(node: fx.Node) -> bool:
    """Whether a node of a body is pointwise, or has no part in what is computed."""
    if node.op in ("placeholder", "output") or op_name(node) == "_set_grad_enabled":
        return True
    return is_pointwise(node)


def _dispatched(node: fx.Node) -> list[torch._ops.OpOverload]:
    args = tree_map(_tiny, (tuple(node.args), dict(node.kwargs)))
    with _Recorder() as recorder, torch.no_grad():
        if node.op == "call_method":
            out = getattr(args[0][0], str(node.target))(*args[0][1:], **args[1])
        else:
            assert callable(node.target)
            out = node.target(*args[0], **args[1])
    shapes = [leaf.shape for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    if not isinstance(out, torch.Tensor) or out.shape != torch.broadcast_shapes(*shapes):
        return []
    return list(recorder.ops)


def _tiny(leaf: object) -> object:
    example = value(leaf)
    if isinstance(example, torch.Tensor):
        # Counted from the last dimension no two sizes are alike: what does not broadcast as usual
        # (the weights of a prelu, which belong to dimension 1) has no result.
        sizes = enumerate(reversed(example.shape), start=3)
        shape = [1 if isinstance(s, int) and s == 1 else size for size, s in sizes]
        return torch.empty(shape[::-1], dtype=example.dtype, device="meta")
    return 3 if isinstance(example, torch.SymInt) else example


def _is_elementwise(op: torch._ops.OpOverload) -> bool:
    if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    name = op._schema.name
    return torch.Tag.pointwise in op.tags or name in _UNTAGGED or name in _TRANSPARENT
