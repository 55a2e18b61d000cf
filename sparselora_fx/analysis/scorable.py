"""Whether a region's own function can be replayed on approximations, and what that reads."""

from __future__ import annotations

from torch import fx

from sparselora_fx.analysis.channel_values import Channels, Values, completes_site
from sparselora_fx.graph.layout import channel_map
from sparselora_fx.graph.nodes import op_name, tensor
from sparselora_fx.graph.op_families import CASTS, NORMS, RESHAPES
from sparselora_fx.graph.pointwise import is_pointwise

SEEN_THROUGH = CASTS | RESHAPES | {"dropout"}
_REPLAYED = NORMS | {"mean", "sum", "var", "std", "normalize", "rrelu"}


def can_score(node: fx.Node, values: Values, answers: dict[fx.Node, bool]) -> bool:
    """Whether `Replay` can rebuild a node from its producers' approximations.

    ``answers`` keeps the answers, as consumers all along a residual stream ask about the same
    nodes.

    Lattice:    yes or no.
    Direction:  backward from the consumer's input to its producers, each node once.
    Rule:       a moved value needs a channel map; a call must be pointwise, a cast, a reshape, a
                norm or a reduction, on operands that can be rebuilt; no side input may have a value
                for each token and channel, as the approximation has other tokens.
    Sound:      a wrong yes would choose other channels, never compute another function of them.
    """
    if node not in answers:
        answers[node] = _can_score(node, values, answers)
    return answers[node]


def _can_score(node: fx.Node, values: Values, answers: dict[fx.Node, bool]) -> bool:
    value = values.get(node)
    if not isinstance(value, Channels):
        return False
    if value.moved:
        return value.ports[0].layout is not None and channel_map(value.ports[0].layout) is not None
    held = [source for source in node.all_input_nodes if source in values]
    if completes_site(node, value):
        return can_score(held[0], values, answers)
    name = op_name(node)
    if not (name in SEEN_THROUGH or name in _REPLAYED or is_pointwise(node)):
        return False
    others = [source for source in node.all_input_nodes if source not in values]
    return all(can_score(source, values, answers) for source in held) and not any(
        map(_is_full_width, others)
    )


def _is_full_width(node: fx.Node) -> bool:
    """Whether a side input has a value for every token and every channel: not a function of the
    producers."""
    example = tensor(node)
    if example is None or example.dim() < 2:
        return False
    return example.shape[-1] != 1 and any(size != 1 for size in example.shape[:-1])


def side_inputs(node: fx.Node, values: Values) -> set[fx.Node]:
    """Nodes that a replay reads besides the producers: scales, biases, norm weights."""
    value = values[node]
    assert isinstance(value, Channels)
    if value.moved:
        return set()
    held = [source for source in node.all_input_nodes if source in values]
    if completes_site(node, value):
        return side_inputs(held[0], values)
    own = {source for source in node.all_input_nodes if source not in values}
    return own.union(*(side_inputs(source, values) for source in held))
