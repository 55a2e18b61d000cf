"""Replace the linears of each region by sliced ones: exact, one site at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparselora_fx.analysis.regions import Region, RowSelection, Site
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.score_subgraph import channel_rows
from sparselora_fx.rewrite.token_split import cast_of, gathered, logical_weight, merged

_Sliced = Callable[[fx.Node], fx.Node]


def slice_sites(rewrite: Rewrite) -> int:
    """Slice every site of every region with its selection. Returns the sites sliced.

    Before:  g: [T, N] = linear(x, wg, bg);                  y: [T, M] = linear(h, wd, bd)
    After:   c: [T, k] = sliced_linear(x, wg, s)             d: [T, k] = gather_channels(h, s)
             g: [T, N] = scatter_channels(c, s, N) + bg      y: [T, M] = sliced_linear_in(d, wd, s)
             + bd
    With a token split (context tokens c, output tokens o), each linear becomes
             scatter_two_lists(sliced(gather_tokens(x, c)), linear(gather_tokens(x, o), w), c, o) +
             bias
    Keeps:   biases and LoRA branches at full width; with lora_branch="sparse" the branches are cut
             to the
             selection too. What each site computes is its definition (masked-dense), whatever
             reads it.
    Source:  arXiv 2506.16500, section 3; LoRA and output tokens stay dense, as there.
    """
    sliced = 0
    for region in rewrite.regions:
        for site in region.producers:
            _slice_producer(site, region, rewrite)
        for pick in region.consumed:
            _slice_consumer(pick, region, rewrite)
        sliced += len(region.sites)
    return sliced


def _slice_producer(site: Site, region: Region, rewrite: Rewrite) -> None:
    graph = rewrite.graph
    with graph.inserting_before(site.node):
        parts = []
        for choice in region.choices:
            assert choice.selection is not None
            picks = [pick for pick in choice.producers if pick.site is site]
            parts += [channel_rows(graph, choice.selection, pick) for pick in picks]
        rows = parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts,))
        region.rows[site] = rows
        weight = logical_weight(graph, site)

    def sliced(x: fx.Node) -> fx.Node:
        kept = graph.call_function(OPS.sliced_linear.default, (x, weight, rows))
        return _scatter(graph, kept, rows, site.out_features)

    _replace_products(graph, site, sliced)
    if rewrite.options.lora_branch == "sparse":
        for addition, branch in site.adapter_adds.items():
            with graph.inserting_before(addition):
                addition.replace_input_with(branch, _mask_branch(graph, branch, site, rows))


def _slice_consumer(pick: RowSelection, region: Region, rewrite: Rewrite) -> None:
    graph, site = rewrite.graph, pick.site
    selection = region.choices[-1].selection
    assert selection is not None
    with graph.inserting_before(site.node):
        columns = channel_rows(graph, selection, pick)
        region.rows[site] = columns
        weight = logical_weight(graph, site)

    def sliced(h: fx.Node) -> fx.Node:
        kept = graph.call_function(OPS.gather_channels.default, (h, columns))
        return graph.call_function(OPS.sliced_linear_in.default, (kept, weight, columns))

    _replace_products(graph, site, sliced)
    if rewrite.options.lora_branch == "sparse":
        _mask_adapter_input(site, graph, columns)


def _replace_products(graph: fx.Graph, site: Site, sliced: _Sliced) -> None:
    """Put sliced products in the place of all that read the site's weight; a bias is the first
    one's."""
    for node, x in [(site.node, site.x), *site.more.items()]:
        with graph.inserting_before(node):
            result = _by_token(graph, site, node, x, sliced)
            if node is site.node:
                result = _add_bias(graph, result, site)
        _replace(node, result)


def _by_token(graph: fx.Graph, site: Site, node: fx.Node, x: fx.Node, sliced: _Sliced) -> fx.Node:
    """The sliced product on context tokens and the dense one on output tokens; all tokens sliced if
    there is no split."""
    if site.split is None:
        return sliced(x)
    parts = gathered(graph, x, site.split)
    weight = logical_weight(graph, site, cast_of(site, node, x))
    dense = graph.call_function(torch.nn.functional.linear, (parts[1], weight))
    return merged(graph, sliced(parts[0]), dense, site.split, like=node, sizes_of=x)


def _mask_adapter_input(site: Site, graph: fx.Graph, columns: fx.Node) -> None:
    """Let a consumer's LoRA branch read only the selected channels."""
    readers = [node for node in graph.nodes if node in site.adapter_nodes]
    for reader in readers:
        for source in [n for n in reader.all_input_nodes if n not in site.adapter_nodes]:
            if source.op == "placeholder":
                continue
            # The branch may come before the base linear, where the columns do not exist yet: take
            # them along.
            with graph.inserting_before(reader):
                cols = graph.node_copy(columns) if columns.op == "call_function" else columns
                reader.replace_input_with(source, _mask(graph, source, site, cols))


def _mask_branch(graph: fx.Graph, branch: fx.Node, site: Site, rows: fx.Node) -> fx.Node:
    """A LoRA branch with only the selected channels, also where it is added head by head: ``[...,
    N]`` or ``[..., heads, N / heads]``."""
    example = branch.meta["example_value"]
    axis, width = example.dim() - 1, example.shape[-1]
    while axis > 0 and width != site.out_features:
        axis, width = axis - 1, width * example.shape[axis - 1]
    if axis == example.dim() - 1:
        return _mask(graph, branch, site, rows)
    flat = graph.call_method("flatten", (branch, axis))
    return graph.call_method("view_as", (_mask(graph, flat, site, rows), branch))


def _mask(graph: fx.Graph, x: fx.Node, site: Site, idx: fx.Node) -> fx.Node:
    """x with the channels outside idx set to zero, on context tokens only if the tokens are
    split."""
    n = int(x.meta["example_value"].shape[-1])

    def masked(part: fx.Node) -> fx.Node:
        kept = graph.call_function(OPS.gather_channels.default, (part, idx))
        return _scatter(graph, kept, idx, n)

    if site.split is None:
        return masked(x)
    parts = gathered(graph, x, site.split)
    return merged(graph, masked(parts[0]), parts[1], site.split, like=x, sizes_of=x)


def _scatter(graph: fx.Graph, y: fx.Node, idx: fx.Node, n: int) -> fx.Node:
    return graph.call_function(OPS.scatter_channels.default, (y, idx, n))


def _add_bias(graph: fx.Graph, y: fx.Node, site: Site) -> fx.Node:
    """y + bias, in the dtype of the linear: under autocast the bias may be wider than y."""
    if site.bias is None:
        return y
    bias, dtype = site.bias, site.node.meta["example_value"].dtype
    if bias.meta["example_value"].dtype != dtype:
        bias = graph.call_method("to", (bias, dtype))
    return graph.call_function(torch.add, (y, bias))


def _replace(old: fx.Node, new: fx.Node) -> None:
    """Put a node in the place of a dense linear. The linear must go at once: as a reader of its
    input, it would keep the later passes from moving gathers past that input."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
