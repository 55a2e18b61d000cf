"""The example values of nodes: the only place that writes them.

A value is what a node's op returns for the values of its inputs, as Dynamo leaves it: fake tensors
(real ones in a graph that holds real ones), whose sizes stay symbolic. A graph that is watched
gives each new node its own when it is made, so that a pass may ask a node that it has just made for
its shape, as it may ask any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils._pytree import tree_leaves

from sparselora_fx import _torch
from sparselora_fx.graph.nodes import called

_CALLS = ("call_function", "call_method")


def watch(gm: fx.GraphModule) -> None:
    """From now on each node made in this graph carries its value. Watching twice is watching
    once."""
    _torch.watch_new_nodes(gm, _give_value)


def unwatch(gm: fx.GraphModule) -> None:
    """Make new nodes without values, as usual."""
    _torch.unwatch_new_nodes(gm, _give_value)


def copied(node: fx.Node, replaced: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The same call of other inputs, at the graph's insertion point, with a value of its own."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), replaced)
    return node.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)


def set_value(node: fx.Node, example: object) -> None:
    """Give a node the value of another one: of the same input, or of the same call with fewer or
    more results."""
    node.meta["example_value"] = example


def lowered_call(graph: fx.Graph, target: Callable[..., object], *args: object) -> fx.Node:
    """A call in a graph that autograd has left, with the value that such graphs' nodes carry."""
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = called(node, lambda source: source.meta["val"])
    return node


def has_value(node: fx.Node) -> bool:
    """Whether a node has the value of a call: only calls of what Dynamo left without one have
    none."""
    inputs = node.all_input_nodes
    return "example_value" in node.meta or any("example_value" not in n.meta for n in inputs)


def propagate(gm: fx.GraphModule, nodes: Iterable[fx.Node], env: dict[fx.Node, object]) -> None:
    """Compute nodes anew, in their order, from the values that ``env`` has of what they read, and
    leave theirs there and on them."""
    runner = fx.Interpreter(gm, garbage_collect_values=False)
    runner.env = env
    mode = next((found for fake in env.values() if (found := mode_of(fake)) is not None), None)
    faked = contextlib.nullcontext() if mode is None else mode
    with faked, _torch.python_dispatcher(), _unsaved():
        for node in nodes:
            env[node] = runner.run_node(node)
            set_value(node, env[node])


def mode_of(value: object) -> FakeTensorMode | None:
    """The mode in which the first fake tensor of a value is computed with; None if it has none."""
    fakes = (leaf for leaf in tree_leaves(value) if isinstance(leaf, FakeTensor))
    return next((fake.fake_mode for fake in fakes), None)


def mode_in(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode in which a graph's values are computed; None where they are no fake tensors."""
    found = (mode_of(node.meta.get("example_value")) for node in graph.nodes)
    return next((mode for mode in found if mode is not None), None)


def _give_value(node: fx.Node) -> None:
    """Compute a new node on what its inputs hold. A node of an input without a value has none."""
    inputs = node.all_input_nodes
    if node.op not in _CALLS or any("example_value" not in n.meta for n in inputs):
        return
    held = ([n.meta["example_value"] for n in inputs], node.args, node.kwargs)
    mode = mode_of(held) or mode_in(node.graph)
    with _computing(mode), _autocast_at(node.graph):
        set_value(node, _result(node))


@contextlib.contextmanager
def _computing(mode: FakeTensorMode | None) -> Iterator[None]:
    """Compute on fake tensors: no size is decided for good, and no guard added."""
    shapes = getattr(mode, "shape_env", None)
    quiet = contextlib.nullcontext() if shapes is None else shapes.suppress_guards()
    faked = contextlib.nullcontext() if mode is None else mode
    with torch.enable_grad(), faked, _torch.python_dispatcher(), quiet, _unsaved():
        yield


def _unsaved() -> contextlib.AbstractContextManager[None]:
    """What fake tensors save for a backward is not shown to hooks of the user's: those that move it
    to the CPU, say, would get it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda held: held, lambda held: held)


@contextlib.contextmanager
def _autocast_at(graph: fx.Graph) -> Iterator[None]:
    """The autocasts that a graph itself has entered, and not left, where nodes are made now."""
    entered: list[object] = []
    for enter in graph.find_nodes(op="call_function", target=_enter_autocast):
        if _torch.inserts_after(graph, enter) and not any(
            _torch.inserts_after(graph, leave) for leave in enter.users
        ):
            entered.append(_enter_autocast(*enter.args))
    try:
        yield
    finally:
        for held in reversed(entered):
            _exit_autocast(held)


def _result(node: fx.Node) -> object:
    return called(node, lambda source: source.meta["example_value"])
