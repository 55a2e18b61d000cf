"""Indices that a graph holds as numbers, as affine maps."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.graph.layout import Atom
from sparselora_fx.graph.nodes import called

_MAX = 4096  # elements; heads are counted in dozens


def run_of(index: object) -> tuple[int, tuple[Atom, Atom]] | None:
    """``(start, (outer, inner))`` such that ``index[i * inner.size + j] == start + i *
    outer.stride + j * inner.stride``, for a list of indices or a tensor made of numbers alone.

    None where there is no such map, or where what the index is depends on the graph's inputs.
    """
    found = index if isinstance(index, list) else _evaluated(index)
    numbers = [n for n in found or () if type(n) is int]
    if found is None or not numbers or len(numbers) != len(found):
        return None
    count, start = len(numbers), numbers[0]
    for inner in (n for n in range(1, count + 1) if count % n == 0):
        step = numbers[1] - start if inner > 1 else 0
        stride = numbers[inner] - start if inner < count else 0
        made = [start + i // inner * stride + i % inner * step for i in range(count)]
        if made == numbers and min(numbers) >= 0 and min(step, stride) >= 0:
            return start, (Atom(count // inner, stride), Atom(inner, step))
    return None


def _evaluated(node: object) -> list[object] | None:
    """The values of a one-dimensional tensor that depends on numbers alone."""
    if not isinstance(node, fx.Node):
        return None
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dim() != 1 or not _is_constant(node, 0):
        return None
    values = _value(node)
    return values.tolist() if isinstance(values, torch.Tensor) else None


def _is_constant(node: fx.Node, depth: int) -> bool:
    example = node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or depth > 8:
        return False
    if not isinstance(example, torch.Tensor) or example.dtype.is_floating_point:
        return False
    sizes = all(isinstance(n, int) for n in example.shape)
    if not sizes or example.numel() > _MAX or torch.Tag.nondeterministic_seeded in _tags(node):
        return False
    return all(_is_constant(n, depth + 1) for n in node.all_input_nodes)


def _tags(node: fx.Node) -> list[torch.Tag]:
    return getattr(node.target, "tags", [])


def _value(node: fx.Node) -> object:
    return called(node, _value)
