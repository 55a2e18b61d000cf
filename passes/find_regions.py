"""Group sites into FFN and attention regions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparselora_fx.analysis.channel_flow import propagate
from sparselora_fx.analysis.channel_values import Channels, Port, Values, attention_of
from sparselora_fx.analysis.readers import lost_in, outside_reader, roots_of
from sparselora_fx.analysis.reasons import CACHED, NO_FACTORS, NO_TOKENS, OTHER_GRID, UNORDERED
from sparselora_fx.analysis.regions import (
    FOREIGN,
    IN_ORDER,
    Attention,
    ChannelChoice,
    Heads,
    Region,
    RowSelection,
    Site,
    Skip,
    kept_channels,
)
from sparselora_fx.analysis.scorable import can_score
from sparselora_fx.analysis.token_rows import token_rows
from sparselora_fx.graph.layout import Atom, ChannelMap, channel_map
from sparselora_fx.graph.nodes import tensor
from sparselora_fx.ir.markers import MarkedTokens
from sparselora_fx.rewrite.rewrite import Rewrite
from sparselora_fx.rewrite.token_split import sees_grid

NO_CHANNELS = (
    "its input is not a function of marked linears' channels alone, and its output feeds no region"
)


class NoRegion(Exception):
    """A consumer does not close a region; the text says why."""


def find_regions(rewrite: Rewrite) -> int:
    """Find, for every site, whether it closes a region. Returns the regions found; the graph is
    unchanged.

    FFN:        h = f(linear(x, w1), linear(x, w2), ...);  y = linear(h, w3)          f pointwise
                (norms allowed); z = linear(g(h), w4), ... share the choice
    Attention:  y = linear(merge(attention(heads(linear(x, wq)), heads(linear(x, wk)),
                heads(linear(x, wv)))), wo)
    Skips:      a site whose channels are also read elsewhere, layouts that are no affine map,
                sites whose plan differs, k that rounds to all channels; each with its reason.
    Source:     channels as strided layouts, after CuTe; which linears share a choice: arXiv
                2506.16500, section 3.
    """
    values = rewrite.values = propagate(rewrite.graph, rewrite.sites)
    reasons: dict[Site, str] = {}
    found: list[Region] = []
    scorable: dict[fx.Node, bool] = {}
    feeds: dict[Site, str] = {}
    closed: list[Region] = []
    for consumer in rewrite.sites:
        try:
            closed.append(_region(consumer, values, scorable))
        except NoRegion as reason:
            reasons[consumer] = str(reason)
            feeds |= dict.fromkeys(roots_of(consumer, values), f"what it feeds is dense: {reason}")
    for region in _joined(closed):
        try:
            _check_readers(region, values)
            found.append(region)
        except NoRegion as reason:
            reasons |= dict.fromkeys(region.sites, str(reason))
    _put_attention_first(found, reasons)
    taken: set[Site] = set()
    for region in found:
        try:
            _check_factors(region)
            _check_tokens(region, rewrite)
            _choose_kept(region, rewrite)
            if taken & set(region.sites):  # of linears in a row, say
                raise NoRegion("one of its region's linears also belongs to another region")
            rewrite.regions.append(region)
            taken |= set(region.sites)
        except NoRegion as reason:
            reasons |= dict.fromkeys(region.sites, str(reason))
    for site in rewrite.sites:
        if site not in taken:
            text = reasons.get(site, "its output feeds no region")
            text = feeds.get(site, text) if text == NO_CHANNELS else text
            rewrite.skips.append(Skip(site.weight, text))
    return len(rewrite.regions)


def _region(consumer: Site, values: Values, scorable: dict[fx.Node, bool]) -> Region:
    value = values.get(consumer.x)
    if not isinstance(value, Channels) or not value.roots:
        raise NoRegion(NO_CHANNELS)
    attention = attention_of(value)
    if attention is not None:
        return _attention_region(consumer, value, attention)
    if any(isinstance(source, Attention) for source in value.roots):
        raise NoRegion("its input comes from an attention whose head layout is not understood")
    if not value.ports:
        made = lost_in(consumer.x, values)
        raise NoRegion(
            "its input is no function, channel by channel, of what linears return, "
            f"or {made} is not understood"
        )
    return _ffn_region(consumer, value, values, scorable)


def _ffn_region(
    consumer: Site, value: Channels, values: Values, scorable: dict[fx.Node, bool]
) -> Region:
    picks: dict[Site, list[ChannelMap]] = {}
    for port in value.ports:
        mapped = channel_map(port.layout) if port.layout is not None else None
        if mapped is None or not isinstance(port.source, Site):
            raise NoRegion(
                "its input mixes or reorders channels in a way that is no affine map of weight rows"
            )
        if mapped[0] != consumer.in_features:
            raise NoRegion("its input is not aligned with the channels of its producers")
        picks.setdefault(port.source, []).append(mapped[1])
    for site, maps in picks.items():
        if len({(m.inner, m.outer_stride) for m in maps}) != 1:
            raise NoRegion("the halves of a fused projection are laid out differently")
        if not _covers(maps, consumer.in_features, site.out_features):
            raise NoRegion("some rows of its producer are used by something else")
    if set(value.roots) != set(picks):
        raise NoRegion("its input also depends on other marked linears")
    if any(site.x is consumer.x for site in picks):
        raise NoRegion("it reads what its producers read")
    if not can_score(consumer.x, values, scorable):
        raise NoRegion("the function between its producers and itself cannot be replayed on scores")
    producers = [RowSelection(site, tuple(sorted(maps))) for site, maps in picks.items()]
    choice = ChannelChoice("ffn", consumer.in_features, 0, producers)
    return Region("ffn", [choice], [RowSelection(consumer, (ChannelMap(1, 1, 0),))])


def _covers(maps: list[ChannelMap], channels: int, rows: int) -> bool:
    """Whether the maps together select every row exactly once."""
    return sorted(row for m in maps for row in m.rows(channels)) == list(range(rows))


def _attention_region(consumer: Site, value: Channels, attention: Attention) -> Region:
    port = next(p for p in value.ports if p.source is attention)
    mapped = channel_map(port.layout) if port.layout is not None else None
    columns = attention.heads * attention.value_dim
    if mapped not in {(columns, ChannelMap(1, 1, 0))} or consumer.in_features != columns:
        raise NoRegion("the attention's output reaches it in another order than head by head")
    whole = Heads(consumer, 0, (Atom(attention.heads, attention.value_dim),), attention.value_dim)
    q, k, v, out = (
        _rows(heads, attention)
        for heads in (attention.query, attention.key, attention.value, whole)
    )
    gates = [_gate(p, out, attention) for p in value.ports if p.source is not attention]
    qk = ChannelChoice("qk", attention.kv_heads * attention.head_dim, 0, [q, k])
    producers = [v, *(gate for gate in gates if gate is not None)]
    vv = ChannelChoice("v", attention.kv_heads * attention.value_dim, 0, producers)
    return Region("attention", [qk, *_rest([qk, vv]), vv], [out], attention)


def _joined(regions: list[Region]) -> list[Region]:
    """One region in the place of those whose producers are chosen alike: several consumers of one
    hidden state share its choice."""
    first: dict[object, Region] = {}
    for region in regions:
        chosen = tuple((c.name, c.channels, frozenset(c.producers)) for c in region.choices)
        other = first.setdefault((region.kind, region.attention, chosen), region)
        if other is not region:
            other.consumed += region.consumed
    return list(first.values())


def _gate(port: Port, out: RowSelection, attention: Attention) -> RowSelection | None:
    """Rows of a projection that is multiplied, channel by channel, with the attention's output:
    it reads what the attention reads, and its rows are laid out as heads."""
    mapped = channel_map(port.layout) if port.layout is not None else None
    if mapped is None or not isinstance(port.source, Site):
        return None
    columns, dim = attention.heads * attention.value_dim, attention.value_dim
    inner, stride, offset = mapped[1]
    if (inner, stride) == (1, 1):
        inner, stride = dim, dim
    if (mapped[0], inner) != (columns, dim) or port.source.x is not attention.value.site.x:
        return None
    maps = [
        ChannelMap(dim, m.outer_stride // dim * stride, m.offset // dim * stride + offset)
        for m in out.maps
    ]
    return RowSelection(port.source, tuple(maps), scored=False)


def _rest(choices: list[ChannelChoice]) -> list[ChannelChoice]:
    """Rows of producers that no choice covers (rotary parts shared by all heads, say): choices
    that keep everything."""
    used: dict[Site, list[int]] = {}
    for choice in choices:
        for pick in choice.producers:
            rows = used.setdefault(pick.site, [])
            rows += [row for m in pick.maps for row in m.rows(choice.channels)]
    rest = []
    for number, (site, rows) in enumerate(used.items()):
        if len(set(rows)) != len(rows):
            raise NoRegion("some rows of a query, key or value projection are used twice")
        left = sorted(set(range(site.out_features)) - set(rows))
        if not left:
            continue
        run = next((i for i in range(1, len(left)) if left[i] != left[0] + i), len(left))
        whole = ChannelMap(run, left[run] - left[0] if run < len(left) else run, left[0])
        if whole.rows(len(left)) != left:
            raise NoRegion("some rows of a query, key or value projection are used by nothing")
        pick = RowSelection(site, (whole,))
        rest.append(ChannelChoice(f"rest{number}", len(left), len(left), [pick], whole=True))
    return rest


def _rows(heads: Heads, attention: Attention) -> RowSelection:
    """Rows of every head that shares a kv head, for a channel of that kv head (`repeat_kv`'s
    order)."""
    maps = heads.maps(attention.kv_heads, attention.group_inner)
    if maps is None:
        raise NoRegion("the heads of its queries, keys or values are no affine map of weight rows")
    return RowSelection(heads.site, maps)


def _put_attention_first(regions: list[Region], reasons: dict[Site, str]) -> None:
    """A linear cannot serve two choices: attention goes before linears in a row (a low-rank
    query)."""
    taken = {s for region in regions if region.kind == "attention" for s in region.sites}
    for region in list(regions):
        if region.kind == "ffn" and taken & set(region.sites):
            regions.remove(region)
            text = "what it feeds is sliced by an attention region"
            reasons |= {site: text for site in region.sites if site not in taken}


def _check_readers(region: Region, values: Values) -> None:
    """Refuse a region whose channels anybody but its consumers reads."""
    reader = outside_reader(region, values)
    if reader is not None:
        # What a graph returns of an attention's keys and values is a cache, if anything.
        kept = region.attention is not None and reader == "the graph's output"
        cache = CACHED if kept else ""
        raise NoRegion(f"its channels are also read by {reader}{cache}")


def _check_factors(region: Region) -> None:
    for choice in region.choices:
        for pick in choice.producers:
            factor = tensor(pick.site.factors[0])
            if factor is None or factor.shape[0] != pick.site.out_features:
                raise NoRegion(NO_FACTORS)


def _check_tokens(region: Region, rewrite: Rewrite) -> None:
    """The batch's token lists must be about the tokens that the sites see, in their order; where
    all tokens are sparse, padding must be told from the others."""
    for site in region.sites:
        counted = site.tokens.counted
        if counted is None or sees_grid(site, counted):
            continue
        ordered = replace(site, order=IN_ORDER)
        if site.split is not None and site.order != FOREIGN and sees_grid(ordered, counted):
            raise NoRegion(UNORDERED)
        if site.split is not None:
            raise NoRegion(OTHER_GRID)
        if site in region.consumers:
            continue  # it is not scored by its input
        rows = token_rows(rewrite.graph, rewrite.batch, rewrite.passed)
        site.token_rows = rows.get(site.x)
        if site.x not in rows:
            site.tokens = MarkedTokens()  # no tokens of the batch: every row counts
        elif site.token_rows is None:
            raise NoRegion(NO_TOKENS)


def _choose_kept(region: Region, rewrite: Rewrite) -> None:
    """Set k of every choice, or refuse the region."""
    sparsities = {getattr(site.spec, region.kind) for site in region.sites}
    if len(sparsities) != 1:
        raise NoRegion(f"the plan gives its linears different sparsities: {sorted(sparsities)}")
    sparsity = sparsities.pop()
    if sparsity == 0:
        raise NoRegion("the plan keeps it dense (sparsity 0)")
    for choice in region.choices:
        if not choice.whole:
            choice.kept = kept_channels(choice.channels, sparsity, rewrite.options.channel_multiple)
    if all(choice.kept == choice.channels for choice in region.choices):
        raise NoRegion("k rounds up to all of its channels")
