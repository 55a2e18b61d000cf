"""Compile a graph in pieces, one for each repeated block of the model, and alike pieces once.

The blocks of a deep model give the compiler the same work again and again. Cut between them, the
graph becomes a chain of pieces; those that compute the same from inputs of the same kind share one
compiled function, and neighbours that are like no other piece are compiled together. So compile
time hardly grows with depth, while the trace, the passes and what they know remain those of the
whole graph.

Before:  embed -> block 0 -> block 1 -> block 2 -> block 3 -> norm, head, loss
After:   f(embed, block 0) -> g(block 1) -> g(block 2) -> g(block 3) -> h(norm, head, loss)
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, getitem

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from sparselora_fx.compiler.cut_points import partition
from sparselora_fx.graph.emit import mode_of, propagate, set_value
from sparselora_fx.graph.nodes import value

log = logging.getLogger(__name__)

Compiler = Callable[[fx.GraphModule, Sequence[object]], Callable[..., object]]
Env = dict[fx.Node, object]  # the fake value of each node that more than one piece reads or returns


@dataclass(frozen=True)
class _Piece:
    """Consecutive nodes of a graph as a graph of their own."""

    module: fx.GraphModule
    inputs: list[fx.Node]  # nodes before the piece, in the order of its placeholders
    outputs: list[fx.Node]  # nodes of the piece that are read after it, in the order of its results


def compile_piecewise(
    gm: fx.GraphModule, inputs: Sequence[object], blocks: Iterable[str], compile_graph: Compiler
) -> Callable[..., object]:
    """Compile ``gm`` with ``compile_graph``: whole, or if blocks repeat, piece by piece.

    Args:
        gm: a Dynamo graph.
        inputs: what the graph is compiled with. Pieces get those that they read as they are, and
            fake values of what other pieces make.
        blocks: names of the model's repeated blocks ("model.layers.3").
        compile_graph: called with a graph and its inputs, as a backend of `torch.compile` is.
    """
    runs = partition(gm, blocks)
    if runs is None:
        return compile_graph(gm, inputs)
    env: Env = {node: value(node) for node in gm.graph.find_nodes(op="placeholder")}
    keys = _keys(gm, runs, env)
    if keys is None or len(set(keys)) == len(keys):
        return compile_graph(gm, inputs)
    groups = _merged(runs, keys)
    log.info("%d pieces, %d of them compiled", len(groups), len({key for key, _ in groups}))
    # A fake input would be copied, and the copy of a scalar does not know that it is a symbol.
    env.update(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    return _chain(gm, groups, env, compile_graph)


def _keys(gm: fx.GraphModule, runs: list[list[fx.Node]], env: Env) -> list[Hashable] | None:
    """What each piece computes from what; equal keys may share one compiled function. Fills
    ``env``; None if something else than tensors and sizes goes from piece to piece."""
    if mode_of(list(env.values())) is None:
        return None
    for node in gm.graph.find_nodes(op="get_attr"):
        env[node] = attrgetter(str(node.target))(gm)
    keys: list[Hashable] = []
    results: dict[Hashable, list[object]] = {}
    for run in runs:
        piece = _extract(gm, run, env)
        key = (_graph_key(piece.module), tuple(_input_key(env[node]) for node in piece.inputs))
        if key in results:
            fakes = results[key]
        else:
            propagate(gm, run, env)
            fakes = results[key] = [env[node] for node in piece.outputs]
        if not all(isinstance(fake, torch.SymInt) or _is_plain(fake) for fake in fakes):
            return None
        fakes = [_fresh(fake) for fake in fakes]
        env.update(zip(piece.outputs, fakes, strict=True))
        keys.append(key)
    return keys


def _is_plain(example: object) -> bool:
    """Whether a value is a fake tensor of the common kind, whose size and strides are all of it."""
    if not isinstance(example, Tensor) or mode_of(example) is None:
        return False
    return example.layout is torch.strided


def _fresh(fake: object) -> object:
    """A fake tensor like another, and a view of none: two inputs that share memory would be
    compiled as such."""
    if not isinstance(fake, Tensor):
        return fake
    mode = mode_of(fake)
    assert mode is not None
    with mode:
        return torch.empty_strided(
            fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device,
            requires_grad=fake.requires_grad,
        )  # fmt: skip


def _symbols(example: object) -> set[Hashable]:
    """The symbols in a size, or in a tensor's sizes and strides."""
    if isinstance(example, Tensor):
        parts: tuple[object, ...] = (*example.shape, *example.stride(), example.storage_offset())
    else:
        parts = (example,)
    return {symbol for part in parts for symbol in free_symbols(part)}


def _merged(
    runs: list[list[fx.Node]], keys: list[Hashable]
) -> list[tuple[Hashable, list[fx.Node]]]:
    """Runs with their keys; neighbours whose keys are nobody else's become one run."""
    counts = Counter(keys)
    groups: list[tuple[Hashable, list[fx.Node]]] = []
    alone = False
    for run, key in zip(runs, keys, strict=True):
        if alone and counts[key] == 1:
            groups[-1][1].extend(run)
        else:
            groups.append((key, list(run)))
        alone = counts[key] == 1
    return groups


def _chain(
    gm: fx.GraphModule,
    groups: list[tuple[Hashable, list[fx.Node]]],
    env: Env,
    compile_graph: Compiler,
) -> Callable[..., object]:
    """Compile each distinct piece, and return a function of the graph's inputs that calls them in
    turn."""
    chain = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        values[node] = chain.placeholder(node.name)
    compiled: dict[Hashable, Callable[..., object]] = {}
    for key, nodes in groups:
        piece = _extract(gm, nodes, env)
        if key not in compiled:
            compiled[key] = compile_graph(piece.module, [env[node] for node in piece.inputs])
        call = chain.call_function(_named(compiled[key]), tuple(values[n] for n in piece.inputs))
        for place, node in enumerate(piece.outputs):
            values[node] = chain.call_function(getitem, (call, place))
    for node in gm.graph.find_nodes(op="get_attr"):
        values[node] = chain.get_attr(str(node.target))
    chain.output(fx.map_arg(gm.graph.output_node().args[0], lambda n: values[n]))
    module = fx.GraphModule(gm, chain)
    return module.forward


def _named(compiled: Callable[..., object]) -> Callable[..., object]:
    """A compiled piece under a name that generated code can use, and no frame of its own."""
    piece = partial(compiled)
    piece.__name__ = "piece"  # type: ignore[attr-defined]
    return piece


def _extract(gm: fx.GraphModule, nodes: list[fx.Node], env: Env) -> _Piece:
    """A piece of a graph. Its inputs also hold the sizes that the shapes of the others name."""
    inside = set(nodes)
    used = [n for node in nodes for n in node.all_input_nodes if n not in inside]
    attributes = dict.fromkeys(n for n in used if n.op == "get_attr")
    inputs = list(dict.fromkeys(n for n in used if n.op != "get_attr"))
    inputs = _sizes(gm, inputs, env) + inputs
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        set_value(copies[node], env.get(node))
    for node in itertools.chain(attributes, nodes):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    return _Piece(fx.GraphModule(gm, graph), inputs, outputs)


def _sizes(gm: fx.GraphModule, inputs: list[fx.Node], env: Env) -> list[fx.Node]:
    """The graph's inputs that are sizes named in the shapes of these, as far as they are not among
    them."""
    symbols: set[Hashable] = set()
    for node in inputs:
        symbols |= _symbols(env.get(node))
    sizes = []
    for node in gm.graph.find_nodes(op="placeholder") if symbols else ():
        size = env[node]
        if isinstance(size, torch.SymInt) and node not in inputs and _symbols(size) & symbols:
            sizes.append(node)
    return sizes


def _graph_key(gm: fx.GraphModule) -> str:
    """What a graph computes, in words: the same words, the same results."""
    place = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}

    def word(argument: fx.node.Argument) -> fx.node.Argument:
        return place[argument] if isinstance(argument, fx.Node) else argument

    lines = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            what = _attribute_key(attrgetter(str(node.target))(gm))
        elif node.op == "placeholder":
            what = "input"
        else:
            what = f"{node.target} {id(node.target) if callable(node.target) else ''}"
        args = fx.node.map_aggregate((node.args, node.kwargs), word)
        lines.append(f"{node.op} {what} {args if node.op != 'placeholder' else ''}")
    return "\n".join(lines)


def _attribute_key(held: object) -> str:
    """A body by what it computes, and by what checkpointing keeps of it; else the very object."""
    if not isinstance(held, fx.GraphModule):
        return str(id(held))
    return f"{_graph_key(held)} {id(held.meta.get('_checkpoint_context_fn'))}"


def _input_key(example: object) -> Hashable:
    if not isinstance(example, Tensor):
        return str(example)
    plain = None if _is_plain(example) else id(example)
    return (
        plain, str(tuple(example.shape)), str(example.stride()), example.dtype,
        example.device, example.requires_grad, str(example.storage_offset()),
    )  # fmt: skip
