"""The pass pipeline: one file a pass, in the order below.

A pass is a plain function ``(rewrite: Rewrite) -> int`` that returns how many changes it made. The
runner (`sparselora_fx.compiler.pipeline`) times it, logs it, checks the graph after it and can
leave it out; a pass does its one thing.
"""

if __name__ != "sparselora_fx.passes":
    raise ImportError("import sparselora_fx.passes, not passes: this folder is part of the package")

from sparselora_fx.passes.batch_adapters import batch_adapters
from sparselora_fx.passes.canonicalize import canonicalize
from sparselora_fx.passes.clean_up import clean_up
from sparselora_fx.passes.expand_packed import expand_packed
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.find_unread_padding import find_unread_padding
from sparselora_fx.passes.hoist_channel_gathers import hoist_channel_gathers
from sparselora_fx.passes.hoist_token_gathers import hoist_token_gathers
from sparselora_fx.passes.insert_observers import insert_observers
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.passes.join_adapters import join_adapters
from sparselora_fx.passes.join_factors import join_factors
from sparselora_fx.passes.orient_adapters import orient_adapters
from sparselora_fx.passes.sink_producers import sink_producers
from sparselora_fx.passes.skip_padding import skip_padding
from sparselora_fx.passes.skip_zeros import skip_zeros
from sparselora_fx.passes.slice_packed import slice_packed
from sparselora_fx.passes.slice_sites import slice_sites
from sparselora_fx.passes.trim_logits import trim_logits
from sparselora_fx.passes.trim_queries import trim_queries
from sparselora_fx.passes.weigh_regions import weigh_regions

# Of a traced graph with its bodies, before any pass changes them.
WHOLE_GRAPH = (
    expand_packed,  # a quantised weight looks like a plain one
    find_unread_padding,
)

# Then of each body and of the graph itself.
PIPELINE = (
    canonicalize,  # one form for what later passes look for
    find_sites,  # markers -> sites (frozen linear + LoRA branch)
    find_regions,  # sites -> FFN and attention regions, or the reason why not
    weigh_regions,  # those that cannot pay stay dense, where speed is asked for
    sink_producers,  # all that a predictor reads comes before the first producer
    insert_predictor,  # each region's channel choice, from the factors
    slice_sites,  # each site by its masked-dense definition, on the choice only
    skip_zeros,  # LoRA branches read what the choice has left of their input
    trim_logits,  # loss on the rows that carry a label
    hoist_token_gathers,  # context and output tokens apart, padding not at all
    trim_queries,  # attention rows that nobody reads need no query of their own
    hoist_token_gathers,  # those queries, too, for the tokens of one list
    skip_padding,  # in linears that stay dense
    hoist_token_gathers,  # and in what lies between them
    hoist_channel_gathers,  # compute only what the choice keeps
    clean_up,  # erase what is unread
    join_factors,  # predictors' narrow projections of one input: one matmul
    join_adapters,  # LoRA down-projections of one input: one matmul
    batch_adapters,  # LoRA up-projections of one shape: one batched matmul, on a GPU
    orient_adapters,  # LoRA up-projections: the layout whose gradients are fast
    slice_packed,  # of quantised weights only what is multiplied is unpacked
)

ONLINE_CALIBRATION = (insert_observers,)  # of a graph with observers and no site

# What cannot be left out (``SPARSELORA_DISABLED_PASSES``), and why.
NEEDED = {
    "find_sites": "every later pass reads the sites that it finds",
    "find_regions": "insert_predictor and slice_sites read the regions that it finds",
    "sink_producers": "insert_predictor reads what it puts before the producers",
    "insert_predictor": "slice_sites reads the channels that it chooses",
    "slice_sites": "the graph returns the rows that it slices",
    "slice_packed": "weights that look plain would be unpacked whole",
    "trim_logits": "it takes its own marker out; compile without trim_logits=True instead",
    "insert_observers": "it takes its own markers out; calibrate with an estimator instead",
}

__all__ = ["NEEDED", "ONLINE_CALIBRATION", "PIPELINE", "WHOLE_GRAPH"]
