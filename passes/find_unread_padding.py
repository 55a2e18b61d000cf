"""Find where rows of padding cannot reach a loss: before any pass, on a graph with its bodies."""

from __future__ import annotations

from sparselora_fx.analysis.padding_proof import padding_unread
from sparselora_fx.rewrite.rewrite import Program


def find_unread_padding(program: Program) -> int:
    """Say of each node of a graph and its bodies whether its rows of padding are read. Returns the
    nodes whose rows are not.

    Before:  m = site(x, w, a, b, lists, spec);  y = linear(m, w);  loss = cross_entropy(y, labels)
    After:   the same graph;  program.padding_unread = {m, y, ...}
    Keeps:   everything. It comes first, because later passes move rows where no proof finds them.
    Skips:   a graph whose sites carry no list of the tokens that are no padding.
    Source:  abstract interpretation of masks (`analysis.padding_proof`).
    """
    program.padding_unread = padding_unread(
        program.gm, program.inputs, program.call.arguments, program.options.shift
    )
    return len(program.padding_unread)
