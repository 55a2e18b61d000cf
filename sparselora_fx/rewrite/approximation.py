"""Build, in a graph, what a score looks at: the tokens it reads and the approximated linears."""

from __future__ import annotations

import torch
from torch import fx

from sparselora_fx.analysis.regions import Site
from sparselora_fx.graph.emit import copied
from sparselora_fx.graph.nodes import op_name, operand, tensor
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.rewrite import Options

_linear = torch.nn.functional.linear
_AS_IT_IS = {"dropout", "view", "reshape", "flatten", "contiguous", "detach"}


class View:
    """The tokens of one region that its score reads, as rows that every tensor of tokens has.

    ``pooled``: one row a sample. ``strided``: a sample of the context tokens. ``tokens``: all
    context tokens. ``counted`` are the rows that count in a mean (None: all).
    """

    def __init__(self, graph: fx.Graph, site: Site, options: Options, *, pool: bool) -> None:
        """``pool``: let the term "pooled" mean it (feed-forward regions; in attention it does
        not)."""
        self.graph = graph
        self.token_weight = site.token_weight
        context = options.score.context
        self.kind = "tokens" if context == "pooled" and not pool else context
        self.samples = options.score.samples
        self.context = site.split[0] if self.kind == "tokens" and site.split and pool else None
        self.counted: fx.Node | None = None
        if self.kind == "tokens":
            self.counted = site.token_weight
        if self.context:
            self.counted = graph.call_function(torch.ge, (self.context[0], 0))
        self.done: dict[fx.Node, fx.Node] = {}

    def rows(self, node: fx.Node) -> fx.Node:
        """A tensor of tokens ``[B, L, C]``, detached, on the rows that the score reads."""
        if node not in self.done:
            self.done[node] = self._rows(node, self.graph.call_method("detach", (node,)))
        return self.done[node]

    def _rows(self, node: fx.Node, x: fx.Node) -> fx.Node:
        call = self.graph.call_function
        if self.kind == "pooled":
            return call(OPS.pool_tokens.default, (x, self.token_weight))
        if self.kind == "strided":
            gathered = call(OPS.sample_tokens.default, (x, self.token_weight, self.samples))
        elif self.context:
            gathered = call(OPS.gather_or_zero_tokens.default, (x, *self.context))
        else:
            return x
        example = tensor(node)
        assert example is not None
        return (
            self.graph.call_method("unsqueeze", (gathered, 0)) if example.dim() == 3 else gathered
        )


class Approximation:
    """The low-rank approximation of sites on the rows of a view.

    ``a (b x) + offset``, with the bias unless the score is the paper's pooled one, and with
    ``track_adapter`` plus the site's own LoRA branches, exactly (a branch is low rank already).
    """

    def __init__(self, graph: fx.Graph, view: View, options: Options) -> None:
        self.graph = graph
        self.view = view
        self.options = options

    def build(self, site: Site) -> fx.Node:
        """``[rows, N]``."""
        add = self.graph.call_function
        out = add(OPS.low_rank_linear.default, (self.narrow(site), site.factors[0]))
        for extra in self.extras(site):
            out = add(torch.add, (out, extra))
        if self.tracked(site):
            x = self.view.rows(site.x)
            for branch in site.adapter_adds.values():
                out = add(torch.add, (out, self._branch(branch, site, x, {})))
        return out

    def narrow(self, site: Site) -> fx.Node:
        """``b x``: ``[rows, R]``."""
        return self.graph.call_function(_linear, (self.view.rows(site.x), site.factors[1]))

    def extras(self, site: Site) -> list[fx.Node]:
        """What is added to every token: the offset, the biases."""
        found = [site.statistics["offset"]] if "offset" in site.statistics else []
        if self.options.score.context != "pooled":
            outside = [n for add in site.bias_adds for n in add.args if _is_placeholder(n)]
            biases = [site.bias, *outside]
            found += [self.graph.call_method("detach", (b,)) for b in biases if b is not None]
        return found

    def tracked(self, site: Site) -> bool:
        """Whether adapters enter this site's approximation."""
        return self.options.track_adapter and bool(site.adapter_adds)

    def _branch(
        self, node: fx.Node, site: Site, x: fx.Node, done: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """A LoRA branch computed on x, its weights detached, its dropout off."""
        if _is_placeholder(node):
            return node if tensor(node) is None else self.graph.call_method("detach", (node,))
        if node not in site.adapter_nodes:
            return x  # the site's input, or what it was before views
        if node not in done:
            if op_name(node) in _AS_IT_IS:
                done[node] = self._branch(operand(node), site, x, done)
            else:
                copies = {n: self._branch(n, site, x, done) for n in node.all_input_nodes}
                done[node] = copied(node, copies.__getitem__)
        return done[node]


def _is_placeholder(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"
