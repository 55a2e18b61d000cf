"""Graphs as people read them: shapes, short names, and the module that each line comes from."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from sparselora_fx.graph.nodes import op_name, value
from sparselora_fx.model.frozen_weights import canonical_path

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_WIDTH = 72  # where the name of the module begins


def readable(graph: fx.Graph) -> str:
    """One line for each node: its name, what it is, what is computed, in which module.

    ``silu: f32[2, 13, 112] = silu(linear_3)    # layers.0.mlp``
    """
    names: dict[fx.Node, str] = {}
    lines = [_line(node, names) for node in graph.nodes]
    return "\n".join(lines)


def module_of(node: fx.Node) -> str:
    """The module in whose forward a node was traced, as a plan names it; "" if nobody noted it."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['\w+'\]|^L__\w+?__", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    path = path.replace(".__dict__", "").replace("._modules", "")
    return canonical_path(path.strip("."))


def short_name(target: str) -> str:
    """A graph input by where the model holds it.

    ``L_self_modules_up_modules_base_layer_parameters_weight_`` -> ``up.base_layer.weight``; a token
    list by its number: ``tokens_1``.
    """
    name = re.sub(r"^L_self_(dict_)?modules_|^L_|_$|^G_.*TRACE_INPUTS_\d+_", "", target, flags=re.I)
    name = re.sub(r"(_dict)?_modules_|_parameters_|_buffers_", ".", name)
    return name.strip("_.").removeprefix("base_model.model.")


def shown_value(held: object) -> str:
    """``f32[2, 13, 112]`` of a tensor, ``Sym(s0)`` of a size, "" of anything else."""
    if isinstance(held, Tensor):
        word = str(held.dtype).removeprefix("torch.")
        kind = re.sub(r"^[a-z]+", lambda m: _DTYPES.get(m[0], m[0]), word)
        return f"{kind}[{', '.join(map(str, held.shape))}]"
    if isinstance(held, torch.SymInt):
        return f"Sym({held})"
    if isinstance(held, tuple | list) and held:
        return f"({', '.join(map(shown_value, held))})"
    return ""


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {_shown(node.args[0], names)}"
    names[node] = short_name(str(node.target)) if node.op == "placeholder" else node.name
    what = shown_value(value(node))
    head = f"{names[node]}: {what}" if what else names[node]
    if node.op == "placeholder":
        return f"input {head}"
    if node.op == "get_attr":
        return f"{head} = held {node.target}"
    given = [_shown(argument, names) for argument in node.args]
    given += [f"{key}={_shown(held, names)}" for key, held in node.kwargs.items()]
    text = f"{head} = {op_name(node)}({', '.join(given)})"
    module = module_of(node)
    return f"{text:<{_WIDTH}}  # {module}" if module else text


def _shown(held: object, names: dict[fx.Node, str]) -> str:
    if isinstance(held, fx.Node):
        return names.get(held, held.name)
    if isinstance(held, tuple | list):
        inner = ", ".join(_shown(one, names) for one in held)
        return f"({inner})" if isinstance(held, tuple) else f"[{inner}]"
    return repr(held)
