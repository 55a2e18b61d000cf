"""Remove nodes that return their input unchanged, so that later passes see one form."""

from __future__ import annotations

from torch import fx

from sparselora_fx.fx import argument, op_name, tensor
from sparselora_fx.regions import Rewrite

_CAST_METHODS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous"}


def canonicalize(rewrite: Rewrite) -> int:
    """Erase casts to the dtype a tensor already has, and dropout that is off. Returns the nodes
    erased.

    Before:  y: f32 = linear(x, w);  z: f32 = y.to(float32);  u = dropout(z, p=0.0);  v = silu(u)
    After:   y: f32 = linear(x, w);  v = silu(y)
    Keeps:   every value bit for bit (`Tensor.to` with nothing to do returns its input; so does
             dropout that is off).
    """
    erased = 0
    for node in rewrite.graph.nodes:
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            rewrite.graph.erase_node(node)
            erased += 1
    return erased


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None:
        return False
    name = op_name(node)
    if name == "dropout":
        off = argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False
        return off and argument(node, 3, "inplace", False) is False
    if name not in _CAST_METHODS or argument(node, 4, "copy", False) is not False:
        return False
    copies = any(arg is True for arg in node.args[1:])  # x.to(device, dtype, non_blocking, copy)
    same = before.dtype == after.dtype and before.device == after.device
    contiguous = name != "contiguous" or before.is_contiguous()
    return same and contiguous and not copies and not node.kwargs.get("memory_format")
