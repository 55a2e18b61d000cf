"""Spellings of a linear with a given weight, and which way round the weight is stored in them."""

from __future__ import annotations

from torch import fx

from sparselora_fx.graph.nodes import argument, op_name, tensor

WEIGHT_VIEWS = {
    "t",
    "transpose",
    "permute",
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type_as",
}
TRANSPOSED = ("T", "mT")  # attributes


def linear_uses(
    weight: fx.Node, *, transposed: bool = False
) -> list[tuple[fx.Node, fx.Node, bool]]:
    """Nodes that use a weight otherwise than to view or cast it: ``(node, the view it uses, view
    is transposed)``."""
    uses = []
    for user in weight.users:
        if op_name(user) in WEIGHT_VIEWS and user.args and user.args[0] is weight:
            flips = op_name(user) in ("t", "transpose", "permute")
            uses += linear_uses(user, transposed=transposed != flips)
        elif op_name(user) == "getattr" and user.args[1] in (*TRANSPOSED, "data"):
            uses += linear_uses(user, transposed=transposed != (user.args[1] != "data"))
        else:
            uses.append((user, weight, transposed))
    return uses


def stored_kn(weight: fx.Node) -> bool | None:
    """Whether a weight is stored [K, N], by its use; None: it is no single linear's."""
    uses = [use for use in linear_uses(weight) if use[0].users]
    parts = linear_parts(*uses[0][:2]) if len(uses) == 1 else None
    return None if parts is None else uses[0][2] != parts[2]


def linear_parts(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """``(x, bias, weight is given as [K, N])`` of any spelling of a linear, or None."""
    name = op_name(node)
    bias: fx.Node | None = None
    if name == "linear":
        x, w, bias = (
            argument(node, 0, "input"),
            argument(node, 1, "weight"),
            argument(node, 2, "bias"),
        )
        stored_as_kn = False
    elif name == "addmm" and argument(node, 3, "beta", 1) == argument(node, 4, "alpha", 1) == 1:
        bias, x, w = (
            argument(node, 0, "input"),
            argument(node, 1, "mat1"),
            argument(node, 2, "mat2"),
        )
        stored_as_kn = True
    elif name in ("matmul", "mm", "__matmul__"):
        x, w = argument(node, 0, "input"), argument(node, 1, "mat2", node.kwargs.get("other"))
        stored_as_kn = True
    elif name == "einsum":
        return _einsum_parts(node, weight)
    else:
        return None
    if w is not weight or not isinstance(x, fx.Node):
        return None
    bias_value = tensor(bias)
    if bias is not None and (bias_value is None or bias_value.dim() != 1):
        return None
    return x, bias, stored_as_kn


def _einsum_parts(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, None, bool] | None:
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or weight not in operands:
        return None
    terms = equation.replace(" ", "").replace("...", ".")
    left, _, result = terms.partition("->")
    x, _, w = left.partition(",")
    if operands[0] is weight:
        x, w, operands = w, x, operands[::-1]
    if len(w) != 2 or not x or not result or x[:-1] != result[:-1] or len(set(x)) != len(x):
        return None
    if w == result[-1] + x[-1] and isinstance(operands[0], fx.Node):
        return operands[0], None, False
    if w == x[-1] + result[-1] and isinstance(operands[0], fx.Node):
        return operands[0], None, True
    return None
