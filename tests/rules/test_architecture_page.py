"""ARCHITECTURE.md shows what the passes do today."""

from pathlib import Path

from sparselora_fx.passes import ONLINE_CALIBRATION, PIPELINE, WHOLE_GRAPH
from tests.support.ffn_example import PAGE, graphs, page


def test_the_example_is_what_the_passes_make() -> None:
    """Another graph? `python -m tests.support.ffn_example --write`."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = graphs()
    assert "sliced_linear" in after and "sliced_linear" not in before
    assert page(text, before, after) == text


def test_every_pass_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for step in (*WHOLE_GRAPH, *PIPELINE, *ONLINE_CALIBRATION):
        assert f"`{step.__name__}`" in text, step.__name__


def test_every_room_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rooms = {path.parent.name for path in Path(PAGE.parent, "sparselora_fx").glob("*/__init__.py")}
    assert not {room for room in rooms if f"`{room}/`" not in text}
