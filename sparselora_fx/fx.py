"""Small helpers over FX nodes. Nothing here knows about LoRA or sparsity."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparselora_fx.layout import same_shape

Shape = torch.Size

_TRANSPARENT = {
    "aten::detach", "aten::alias", "aten::_to_copy", "aten::clone", "aten::expand", "aten::view",
    "aten::lift_fresh", "aten::unsqueeze", "aten::scalar_tensor", "aten::full",
}  # fmt: skip

# Pointwise, although PyTorch does not tag them so.
_UNTAGGED = {"aten::hardswish", "aten::log_sigmoid_forward", "aten::_prelu_kernel"}


_SHAPE_QUERIES = {
    "size", "dim", "numel", "stride", "is_floating_point", "sym_size", "new_empty", "new_zeros",
    "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like",
}  # fmt: skip


_KEYWORDS = ("and_", "or_", "not_", "is_")  # of module operator: named so for the word's sake


def op_name(node: fx.Node) -> str:
    """The name of what a call node does, the same for a function and for a method (``torch.mul``,
    ``x.mul`` -> ``mul``)."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        return str(getattr(packet or node.target, "__name__", node.target))
    return node.op


def value(node: Any) -> Any:
    """The example value Dynamo left on a node (a fake tensor, a symbolic integer, a tuple, ...),
    or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it is no tensor."""
    example = value(node)
    return example if isinstance(example, torch.Tensor) else None


def with_stand_in(node: fx.Node, model: fx.Node, *, rank: int, channels: int) -> fx.Node:
    """Give a new node an example value that is right in rank, channels and dtype (its token count
    is not known)."""
    dtype = model.meta["example_value"].dtype
    shape = (*[3] * (rank - 1), channels)
    node.meta["example_value"] = torch.empty(shape, dtype=dtype, device="meta")
    return node


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """One argument of a call, whether it was passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def axis_argument(node: fx.Node, position: int, name: str, rank: int, default: int = 0) -> int:
    """A dimension argument as a non-negative integer."""
    return int(argument(node, position, name, default)) % rank


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node reads only sizes, dtypes or devices: it returns no tensor made from its
    input's data."""
    if op_name(node) in _SHAPE_QUERIES:
        return True
    return op_name(node) == "getattr" and argument(node, 1, "") in (
        "shape",
        "dtype",
        "device",
        "ndim",
    )


def writes(node: fx.Node) -> bool:
    """Whether a call changes one of its inputs, or may do anything else than return a value."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    return changes_input(node) or not node.users


def changes_input(node: fx.Node) -> bool:
    """Whether a call changes one of its inputs, by its name, its arguments or its schema."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    name = op_name(node)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS
    spelled = name.strip("_")  # "__iadd__", "iadd": as "add", in place
    augmented = name == "setitem" or (
        spelled[:1] == "i" and hasattr(operator, f"__{spelled[1:]}__")
    )
    flagged = _is_told_to(node, "inplace") or node.kwargs.get("out") is not None
    schema = getattr(node.target, "_schema", None)
    return in_place or augmented or flagged or bool(schema is not None and schema.is_mutable)


def _is_told_to(node: fx.Node, flag: str) -> bool:
    """Whether a call's argument of this name is true, passed by name or by position."""
    return given_place(node, flag) is not None


def given_place(node: fx.Node, flag: str) -> int | str | None:
    """Where a call's true argument of this name was passed: its position or its name; None: it was
    not, or is false."""
    place = _place_of(node.target, flag) if node.op == "call_function" else None
    if place is not None and place < len(node.args):
        return place if node.args[place] not in (None, False) else None
    return flag if node.kwargs.get(flag) not in (None, False) else None


@functools.cache
def _place_of(function: Any, name: str) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin says nothing of its arguments
        return None
    return names.index(name) if name in names else None


def cuts_gradient(node: fx.Node) -> bool:
    """Whether a node makes floating-point values that need no gradient from values that do: a
    ``detach``, or work under ``no_grad``."""
    made = tensor(node)
    if made is None or made.requires_grad or not made.dtype.is_floating_point:
        return False
    sources = (tensor(n) for n in node.all_input_nodes if not is_shape_query(node))
    return any(source is not None and source.requires_grad for source in sources)


def reads_shape_only(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node uses one of its inputs for its sizes, dtype or device alone."""
    if op_name(node) in ("expand_as", "view_as", "reshape_as", "type_as"):
        return node.args[0] is not source
    return is_shape_query(node)


def before_flattening(node: fx.Node) -> fx.Node:
    """What a tensor ``[tokens, channels]`` was before its token dimensions became one."""
    start = node
    while op_name(node) in ("view", "reshape", "flatten") and isinstance(node.args[0], fx.Node):
        example, source = tensor(node), tensor(node.args[0])
        if example is None or source is None:
            break
        if not same_shape(example.shape[-1:], source.shape[-1:]):
            break
        node = node.args[0]
    example = tensor(node)
    return start if example is None or example.dim() < 2 else node


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def _tiny(leaf: Any) -> Any:
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


def bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule, list[Any]]]:
    """Every higher-order op of a graph: ``(call node, body, operands in the order of the body's
    placeholders)``.

    Covers activation checkpointing, `invoke_subgraph` and any op that takes one body and then its
    operands.
    """
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        owned = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        modules = [(a, getattr(gm, str(a.target), None)) for a in owned]
        graphs = [(a, m) for a, m in modules if isinstance(m, fx.GraphModule)]
        if len(graphs) != 1:
            continue
        operands = [a for a in node.args if a is not graphs[0][0] and not isinstance(a, str)]
        body = graphs[0][1]
        if len(operands) == len(body.graph.find_nodes(op="placeholder")):
            yield node, body, operands
