"""Spellings of a linear with a given weight, and which way round the weight is stored in them."""

from __future__ import annotations

from torch import fx

from sparselora_fx.graph.nodes import argument, op_name, tensor
from sparselora_fx.graph.pointwise import is_pointwise

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
ROW_NORMS = {"norm", "linalg_norm", "linalg_vector_norm", "vector_norm", "sum", "mean"}


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


def products(weight: fx.Node) -> list[tuple[fx.Node, fx.Node, bool]]:
    """The uses of a weight that matter to its channels, as `linear_uses` gives them: all, or its
    linears alone where nothing else is made of it but a value for each row (the norms of DoRA)."""
    uses = linear_uses(weight)
    linears = [use for use in uses if linear_parts(*use[:2]) is not None]
    others = [use for use in uses if use not in linears]
    shape = tensor(weight)
    if not linears or shape is None or shape.dim() != 2:
        return uses
    return linears if all(_is_read_by_row(node, weight) for node, *_ in others) else uses


def _is_read_by_row(node: fx.Node, weight: fx.Node) -> bool:
    """Whether what is computed from a weight and others of its shape, element by element, ends in
    vectors."""
    made, shape = tensor(node), tensor(weight)
    if made is None or shape is None:
        return False
    if op_name(node) in ROW_NORMS and made.dim() == 1:
        return True
    sizes = (shape.shape, shape.shape[::-1])
    if made.shape not in sizes or not (op_name(node) in WEIGHT_VIEWS or is_pointwise(node)):
        return False
    return all(_is_read_by_row(user, weight) for user in node.users)


def stored_kn(weight: fx.Node) -> bool | None:
    """Whether a weight is stored [K, N], by its use; None: it is no single linear's."""
    uses = [use for use in products(weight) if use[0].users]
    parts = [linear_parts(*use[:2]) for use in uses]
    stored = {None if p is None else use[2] != p[2] for use, p in zip(uses, parts, strict=True)}
    return stored.pop() if len(stored) == 1 else None


def linear_parts(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """``(x, bias, weight is given as [K, N])`` of any spelling of a linear, or None.

    Rule:   `linear`, `addmm` without factors, `matmul`, `mm`, ``@`` and an einsum that sums over
            x's last letter alone, with the weight in the weight's place.
    Sound:  each is ``x W^T + b`` by its definition; a spelling that is not listed is None, and its
            weight stays dense.
    """
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
