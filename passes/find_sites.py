"""Find the frozen linears that were marked, with their LoRA branches."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparselora_fx.fx import argument, op_name, tensor
from sparselora_fx.ops import OPS
from sparselora_fx.regions import (
    DENSE,
    WITHOUT_GRADIENTS,
    Rewrite,
    Site,
    SiteSpec,
    Skip,
    is_trainable,
)
from sparselora_fx.spellings import as_addition

_WEIGHT_VIEWS = {
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
_CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "detach"}
_MAX_BRANCH = 64  # nodes; a LoRA branch is a handful


def find_sites(rewrite: Rewrite) -> int:
    """Turn every site marker into a `Site`, and take the markers out of the graph. Returns the
    sites found.

    Before:  m = site(x, w, a, b, mask, spec);  y = linear(m, w, bias);  l = linear(linear(x, A),
             B);  z = y + l
    After:   y = linear(x, w, bias);            l = linear(linear(x, A), B);  z = y + l       and
             Site(y, x, w, ..., z)
    Keeps:   every value bit for bit; where a branch is added in another spelling (``y += l``,
             ``addmm(y, h, B)``: `spellings`) up to the rounding of its scale.
    Skips:   a weight that is used twice, not as a linear, or that trains.
    """
    marks = [n for n in rewrite.graph.nodes if n.target is OPS.site.default or n.target is OPS.site]
    by_weight: dict[fx.Node, list[fx.Node]] = {}
    for mark in marks:
        by_weight.setdefault(mark.args[1], []).append(mark)
    carried = {weight: group[0].args for weight, group in by_weight.items()}
    for mark in marks:
        mark.replace_all_uses_with(mark.args[0])
        rewrite.graph.erase_node(mark)
    for weight, args in carried.items():
        if weight.op != "placeholder":
            continue  # computed in the graph (a parametrization): no frozen weight any more
        found = _site(weight, args, len(by_weight[weight]))
        if isinstance(found, Site):
            found.padding_unread = found.node in rewrite.padding_unread
        if args[5] == DENSE:
            rewrite.dense += [] if isinstance(found, Skip) else [found]
        elif isinstance(found, Skip):
            rewrite.skips.append(found)
        else:
            rewrite.sites.append(found)
    for site in rewrite.sites:
        _cast_factors(site)
        _find_adapter(site)
    return len(rewrite.sites)


def _site(weight: fx.Node, args: tuple, calls: int) -> Site | Skip:  # type: ignore[type-arg]
    uses = _linear_uses(weight, transposed=False)
    if is_trainable(weight):
        return Skip(weight, "the weight trains")
    if args[5] == WITHOUT_GRADIENTS:
        return Skip(
            weight,
            "it runs without gradients inside a training step (a reversible layer, say): a "
            "backward that runs it again would not be sliced",
        )
    if calls > 1 or len(uses) > 1:
        return Skip(
            weight,
            "the weight is used more than once in this graph, and its uses would have to share one "
            "choice of channels (a block that is applied several times gets one for each use where "
            "it is checkpointed)",
        )
    if not uses:
        return Skip(weight, "the weight is not used by a linear that is recognised")
    node, view, transposed = uses[0]
    parts = _linear_parts(node, view)
    shape, out = tensor(weight), tensor(node)
    if parts is None or shape is None or out is None or shape.dim() != 2:
        return Skip(
            weight, f"{op_name(node)} with this weight is not a linear over the last dimension"
        )
    x, bias, stored_as_kn = parts
    transposed = transposed != stored_as_kn
    n, k = (int(s) for s in (reversed(shape.shape) if transposed else shape.shape))
    x_value = tensor(x)
    if x_value is None or x_value.shape[-1] != k or out.shape[-1] != n or n == k == 0:
        return Skip(weight, "the linear does not act on the last dimension of its input")
    if x_value.dim() < 2:
        return Skip(
            weight, "its input is a single vector: there are no tokens to score channels by"
        )
    spec = SiteSpec.decode(args[5])
    known = dict(zip(spec.known, (args[6] or ()) if len(args) > 6 else (), strict=True))
    factors = (args[2], args[3])
    return Site(node, x, weight, transposed, bias, factors, tuple(args[4]), spec, n, k, known=known)


def _cast_factors(site: Site) -> None:
    """Where the model casts a weight before it multiplies, its factors are cast alike."""
    dtype, graph = site.cast, site.node.graph
    if dtype is None:
        return
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        a, b = (graph.call_method("to", (factor, dtype)) for factor in site.factors)
    for new, factor in zip((a, b), site.factors, strict=True):
        new.meta["example_value"] = factor.meta["example_value"].to(dtype)
    site.factors = (a, b)


def _linear_uses(weight: fx.Node, *, transposed: bool) -> list[tuple[fx.Node, fx.Node, bool]]:
    """Nodes that use a weight otherwise than to view or cast it: ``(node, the view it uses, view
    is transposed)``."""
    uses = []
    for user in weight.users:
        if op_name(user) in _WEIGHT_VIEWS and user.args and user.args[0] is weight:
            flips = op_name(user) in ("t", "transpose", "permute")
            uses += _linear_uses(user, transposed=transposed != flips)
        elif op_name(user) == "getattr" and user.args[1] in ("T", "mT", "data"):
            uses += _linear_uses(user, transposed=transposed != (user.args[1] != "data"))
        else:
            uses.append((user, weight, transposed))
    return uses


def _linear_parts(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node | None, bool] | None:
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


def _find_adapter(site: Site) -> None:
    """Follow a site's output through views and casts to the additions of bias and LoRA branches."""
    node = site.node
    while as_addition(node) or len(node.users) == 1:
        user = next(iter(node.users))
        name = op_name(user)
        if name in ("add", "__add__", "__radd__") and len(user.args) == 2 and not user.kwargs:
            other: Any = user.args[1] if user.args[0] is node else user.args[0]
            if _is_bias(other, site):
                site.bias_adds.add(user)
            else:
                branch = adapter_branch(other, site.x) if isinstance(other, fx.Node) else None
                if branch is None:
                    break
                site.adapter_adds[user] = other
                site.adapter_nodes |= branch
                read = {n for inner in branch for n in inner.all_input_nodes}
                site.adapter_weights |= {n for n in read if is_trainable(n)}
        elif name not in _CASTS and name not in ("view", "reshape", "flatten"):
            break
        node = user


def _is_bias(node: Any, site: Site) -> bool:
    example = tensor(node)
    held = isinstance(node, fx.Node) and node.op == "placeholder"
    return held and example is not None and example.shape == (site.out_features,)


def adapter_branch(node: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The nodes of an expression that is computed from x and small weights alone (a LoRA branch),
    or None.

    Recognises any spelling (modules, `F.linear`, `@`, einsum, scaling, dropout, casts): the leaves
    decide, not the shape.
    """
    branch: set[fx.Node] = set()
    todo, reads_x, has_weight = [node], False, False
    sources = _before_views(x)
    while todo:
        current = todo.pop()
        if current in sources:
            reads_x = True
        elif current.op == "placeholder":
            example = tensor(current)
            has_weight |= example is not None and example.dim() >= 2 and is_trainable(current)
        elif current not in branch:
            branch.add(current)
            if len(branch) > _MAX_BRANCH:
                return None
            todo += current.all_input_nodes
    return branch if reads_x and has_weight else None


def _before_views(x: fx.Node) -> set[fx.Node]:
    """x, and what it was before views and casts (a Conv1D flattens its input; its LoRA branch
    reads the unflattened one)."""
    nodes = {x}
    while op_name(x) in (*_CASTS, "view", "reshape", "flatten") and isinstance(x.args[0], fx.Node):
        x = x.args[0]
        nodes.add(x)
    return nodes
