"""What passes leave unread goes; what nobody read from the start stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparselora_fx.passes.clean_up import clean_up
from sparselora_fx.passes.find_regions import find_regions
from sparselora_fx.passes.find_sites import find_sites
from sparselora_fx.passes.insert_predictor import insert_predictor
from sparselora_fx.passes.slice_sites import slice_sites
from tests.support.small_graphs import Small, after, changes_nothing, shown, text


def test_a_chain_that_lost_its_reader_goes() -> None:
    small = Small()
    x = small.input("x", 2, 4)
    old = small.call(F.silu, small.call("neg", x))
    end = small.call(torch.add, old, 1.0)
    rewrite = small.rewrite(end)
    new = small.graph.output_node()
    with small.graph.inserting_before(new):
        end.replace_all_uses_with(small.call("abs", x))
    assert after(rewrite, clean_up) == 3
    assert text(rewrite) == shown("""
        v0 = abs(x)
        return (v0)
    """)
    changes_nothing(rewrite, clean_up)


def test_what_nobody_read_from_the_start_stays() -> None:
    """It is there for what it does: a random draw, a mode, a print."""
    small = Small()
    x = small.input("x", 2, 4)
    small.call(torch.rand, 3)
    rewrite = small.rewrite(small.call("neg", x))
    assert "rand(3)" in text(rewrite)
    changes_nothing(rewrite, clean_up)


def test_selections_and_rows_stay_although_nothing_reads_them() -> None:
    small = Small()
    x = small.input("x", 2, 3, 8)
    up = small.call(F.silu, small.site(x, "up", 16))
    rewrite = small.rewrite(small.site(up, "down", 8))
    after(rewrite, find_sites, find_regions, insert_predictor, slice_sites)
    (region,) = rewrite.regions
    selection = region.choices[0].selection
    assert selection is not None
    for user in list(selection.users):
        user.replace_input_with(selection, rewrite.graph.find_nodes(op="placeholder")[0])
    changes_nothing(rewrite, clean_up)
    assert "topk_channels" in text(rewrite)
