"""Whether rows stand in the order of the batch's tokens: followed back to the batch itself.

Shapes do not say it where a batch has as many samples as tokens, or where tokens are flattened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, fx

from sparselora_fx.analysis.mask_values import is_weight
from sparselora_fx.analysis.regions import FOREIGN, IN_ORDER, MOVED, SWAPPED, UNKNOWN
from sparselora_fx.analysis.token_liveness import DEAD, LiveRows, needed
from sparselora_fx.graph.bodies import bodies
from sparselora_fx.graph.nodes import argument, op_name, reads_shape_only, tensor
from sparselora_fx.ir.ops import OPS

_BATCH = ("input_ids", "inputs_embeds")
_MOVERS = ("flip", "fliplr", "flipud", "roll", "sort", "gather", "take_along_dim", "index_select")
_MARKERS = (OPS.site, OPS.site.default)
_Place = tuple[fx.Node, LiveRows]


def token_inputs(
    gm: fx.GraphModule, inputs: Sequence[object], arguments: Mapping[str, Tensor]
) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """The inputs of a graph that hold the batch's tokens, ``[B, L]`` or ``[B, L, D]``, and all that
    the model's caller gave."""
    given = list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))

    def among(tensors: list[Tensor]) -> frozenset[fx.Node]:
        ids = {id(t) for t in tensors}
        return frozenset(node for node, value in given if id(value) in ids)

    tokens = [arguments[name] for name in _BATCH if name in arguments]
    return among(tokens), among(list(arguments.values()))


def token_orders(
    gm: fx.GraphModule,
    roots: frozenset[fx.Node],
    given: frozenset[fx.Node] = frozenset(),
    beside: frozenset[fx.Node] = frozenset(),
) -> dict[fx.Node, str]:
    """How the rows of each site marker of a graph and its bodies, ``[B, L, N]`` or ``[B * L, N]``,
    stand to the tokens of ``roots``. ``given``: inputs that hold what the model's caller gave, and
    its buffers; all others but weights come from another part of the model. ``beside``: weights
    outside the model's text part, which count where nothing else shows whose rows they get.

    ``IN_ORDER`` where some way back keeps samples and tokens in place, else ``UNKNOWN`` where some
    way ends in what another part of the model has computed, else ``SWAPPED`` (tokens first), else
    ``MOVED`` (reversed, rolled, picked), else ``UNKNOWN``. ``FOREIGN`` where the graph has the
    batch, and the rows are made of other things that the caller gave alone: images, a second text;
    and in the place of ``UNKNOWN`` where the weight is ``beside``.

    Lattice:    the first four words, in the order above, for each place ``(node, axes of samples
                and tokens)``.
    Direction:  backward from the markers, through bodies, until nothing new is reached; then the
                answers come forward again.
    Rule:       `token_liveness.needed` says where the named axes were before a call; an embedding
                leads to its indices; a call that leads nowhere and moves rows ends a way as
                ``MOVED``.
    Sound:      ``IN_ORDER`` needs a way on which every call keeps row i at row i, from the marker
                to the batch. Sums of several ways (a residual) have equal rows on all of them, as
                the model itself adds them row to row.
    """
    walk = _Walk(gm)
    starts = {mark: start for mark in walk.marks if (start := _start(mark)) is not None}
    reached = _reached(walk, list(starts.values()), roots)
    fed = walk.fed_by([*roots, *_from_elsewhere(gm, given)])
    orders = {
        mark: next((word for word, found in reached.items() if start in found), UNKNOWN)
        for mark, start in starts.items()
    }
    for mark, word in orders.items():
        elsewhere = word == UNKNOWN and walk.outermost(mark.args[1]) in beside
        if elsewhere or (roots and mark.args[0] not in fed):
            orders[mark] = FOREIGN
    return orders


def _reached(
    walk: _Walk, starts: list[_Place], roots: frozenset[fx.Node]
) -> dict[str, set[_Place]]:
    """The places on a way back from the starts from which an end of each word is reached, the word
    that wins first."""
    ways: dict[_Place, list[_Place]] = {}  # a place -> the places that lead back to it
    words = (IN_ORDER, UNKNOWN, SWAPPED, MOVED)
    ends: dict[str, set[_Place]] = {word: set() for word in words}
    todo = starts
    seen = set(todo)
    while todo:
        place = todo.pop()
        node, need = place
        if node in roots:
            ends[IN_ORDER if need[:2] == (0, 1) else SWAPPED].add(place)
            continue
        found = list(walk.before(node, need))
        if not found and _moves(node, need):
            ends[MOVED].add(place)
        elif not found and node.op == "placeholder" and not is_weight(node):
            ends[UNKNOWN].add(place)
        for before in found:
            ways.setdefault(before, []).append(place)
        todo += [before for before in found if before not in seen]
        seen.update(found)
    return {word: _led_back(found, ways) for word, found in ends.items()}


def _from_elsewhere(gm: fx.GraphModule, given: frozenset[fx.Node]) -> Iterator[fx.Node]:
    """Inputs of a graph that another part of the model may have computed."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if node not in given and tensor(node) is not None and not is_weight(node):
            yield node


def _led_back(ends: Iterable[_Place], ways: Mapping[_Place, list[_Place]]) -> set[_Place]:
    """The places from which one of some ends is reached."""
    found, todo = set(ends), list(ends)
    while todo:
        for place in ways.get(todo.pop(), []):
            if place not in found:
                found.add(place)
                todo.append(place)
    return found


def _start(mark: fx.Node) -> _Place | None:
    example = tensor(mark)
    if example is None or example.dim() not in (2, 3):
        return None
    return mark, LiveRows(0, example.dim() - 2, ())


class _Walk:
    """The ways back through a graph and its bodies."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.marks: list[fx.Node] = []
        self.outer: dict[fx.Node, list[fx.Node]] = {}  # inputs of bodies -> what they are given
        self.inner: dict[fx.Node, object] = {}  # calls of bodies -> what those return
        self.bodies: list[tuple[fx.Node, fx.Graph]] = []  # and their graphs
        self._enter(gm)

    def _enter(self, gm: fx.GraphModule) -> None:
        self.marks += [n for n in gm.graph.nodes if n.target in _MARKERS]
        for call, body, operands in bodies(gm):
            for node, operand in zip(
                body.graph.find_nodes(op="placeholder"), operands, strict=True
            ):
                if isinstance(operand, fx.Node):
                    self.outer.setdefault(node, []).append(operand)
            self.inner[call] = body.graph.output_node().args[0]
            self.bodies.append((call, body.graph))
            self._enter(body)

    def outermost(self, node: object) -> object:
        """What the graph itself hands to bodies as this input of theirs."""
        while isinstance(node, fx.Node) and node in self.outer:
            node = self.outer[node][0]
        return node

    def fed_by(self, roots: Iterable[fx.Node]) -> set[fx.Node]:
        """Every node into which a value of the roots goes, also through bodies. Sizes are no
        values, and a marker hands on its first operand alone."""
        given: dict[fx.Node, list[fx.Node]] = {}
        for inside, operands in self.outer.items():
            for operand in operands:
                given.setdefault(operand, []).append(inside)
        calls: dict[fx.Graph, list[fx.Node]] = {}
        for call, body in self.bodies:
            calls.setdefault(body, []).append(call)
        found, todo = set(roots), list(roots)
        while todo:
            node = todo.pop()
            fed = [*given.get(node, []), *filter(partial(_hands_on, node), node.users)]
            if node.op == "output":
                fed += calls.get(node.graph, [])
            todo += [each for each in fed if each not in found]
            found.update(fed)
        return found

    def before(self, node: fx.Node, need: LiveRows) -> Iterator[_Place]:
        """Where the rows of a node that are named come from."""
        if node.op == "placeholder":
            yield from ((operand, need) for operand in self.outer.get(node, []))
            return
        source = node.args[0] if node.args and op_name(node) == "getitem" else None
        call = node if node in self.inner else source
        if isinstance(call, fx.Node) and call in self.inner:
            returned = self.inner[call]
            if isinstance(returned, tuple | list):
                returned = returned[0 if node in self.inner else node.args[1]]  # type: ignore[index]
            if isinstance(returned, fx.Node):
                yield returned, need
            return
        if op_name(node) == "embedding":
            held = argument(node, 0, "input")
            example = tensor(held)
            if example is not None and max(need[:2]) < example.dim():
                yield held, need
            return
        for user_input in node.all_input_nodes:
            before = needed(node, user_input, {node: need})
            if before is not None and before != DEAD:
                yield user_input, before


def _hands_on(given: fx.Node, node: fx.Node) -> bool:
    marker = node.target in _MARKERS and node.args[0] is not given
    return not marker and not reads_shape_only(node, given)


def _moves(node: fx.Node, need: LiveRows) -> bool:
    """Whether a node puts rows in another order, or picks some."""
    name, example = op_name(node), tensor(node)
    if name in _MOVERS and example is not None:
        place = {"roll": 2, "sort": 1}.get(name, 1)
        along = argument(node, place, "dims", node.kwargs.get("dim"))
        axes = along if isinstance(along, tuple | list) else (along,)
        known = [a % example.dim() for a in axes if isinstance(a, int)]
        return not known or not {need.batch, need.axis}.isdisjoint(known)
    if name != "getitem":
        return False
    keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(k, fx.Node | list) and (tensor(k) is not None or isinstance(k, list))
               for k in keys)  # fmt: skip
