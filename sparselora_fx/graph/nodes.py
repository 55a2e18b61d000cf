"""Small helpers over FX nodes. Nothing here knows about LoRA or sparsity."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import Target

from sparselora_fx.graph.layout import same_shape

Shape = torch.Size


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


def value(node: object) -> Any:
    """The example value Dynamo left on a node (a fake tensor, a symbolic integer, a tuple, ...),
    or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor(node: object) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it is no tensor."""
    example = value(node)
    return example if isinstance(example, torch.Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: object = None) -> Any:
    """One argument of a call, whether it was passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """An argument of a call that is known to be a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node), f"{node.format_node()}: argument {position} is no node"
    return found


def called(node: fx.Node, value_of: Callable[[fx.Node], Any], function: object = None) -> Any:
    """What a call returns for some values of its arguments; ``function`` in the place of its own,
    if given."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    run = function or node.target
    assert callable(run)
    return run(*args, **kwargs)


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


def has_side_effect(node: fx.Node) -> bool:
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
def _place_of(function: Target, name: str) -> int | None:
    assert callable(function)
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
    if op_name(node) in ("expand_as", "view_as", "reshape_as", "type_as", "to"):
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
