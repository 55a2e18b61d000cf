"""The report's charts: drawn by matplotlib as SVG, in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from sparselora_fx.errors import CompileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib wants colours, the page has variables for light and dark: each of these stands for one.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--dim)", "#030303": "var(--mark)"}
_INK, _DIM, _MARK = _COLOURS
_WIDTH = 4.8  # inches, of 72 units: text of 10 units is read at 390 px, too


def bars(words: str, values: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars from 0 to the largest value: a label, a value and its text each. ``words``
    say what is shown to who cannot see it."""

    def draw(axes: Axes) -> None:
        places = range(len(values))
        axes.barh(places, [value for _, value, _ in values], color=_MARK, height=0.6)
        axes.set_yticks(places, [label for label, *_ in values], color=_INK)
        most = max(value for _, value, _ in values)
        for place, (_, value, text) in zip(places, values, strict=True):
            axes.text(value + most / 80, place, text, va="center", color=_INK)
        axes.set_xlim(0, most * 1.3)
        axes.set_xticks([])
        axes.invert_yaxis()

    spoken = "; ".join(f"{label}: {text}" for label, _, text in values)
    return _svg(draw, 0.4 * len(values) + 0.2, f"{words}: {spoken}")


def curve(words: str, points: Sequence[tuple[float, float]], names: tuple[str, str]) -> Markup:
    """A line with a mark at each point ``(x, y)``; ``names`` of both axes."""
    x, y = zip(*points, strict=True)

    def draw(axes: Axes) -> None:
        axes.plot(x, y, color=_MARK, marker="o", markersize=3)
        axes.axhline(0, color=_DIM, linewidth=0.6)
        axes.set_xlabel(names[0], color=_INK)
        axes.set_ylabel(names[1], color=_INK)
        axes.tick_params(colors=_INK)

    return _svg(draw, 2.2, f"{words}: {len(y)} points, from {y[0]:.4g} to {y[-1]:.4g}")


def _svg(draw: Callable[[Axes], None], height: float, words: str) -> Markup:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompileError(
            "the report's charts need matplotlib, which is not installed; install it with: "
            "pip install 'sparselora_fx[plot]'"
        ) from error
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(side == "left")
    axes.spines["left"].set_color(_DIM)
    draw(axes)
    held = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": words}):
        figure.savefig(held, format="svg", metadata={"Date": None})
    return Markup(_inlined(held.getvalue(), words))


def _inlined(text: str, words: str) -> str:
    """An SVG file as an element of a page: no headers, no size, colours of the page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg {box[0]} class="chart" role="img" aria-label="{escape(words)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return text
