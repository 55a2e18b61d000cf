"""The rules of the house: rooms have ranks, analyses edit nothing, metadata and private torch have
one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import (
    ROOT,
    import_graph,
    imports_in,
    module_of,
    parsed,
    relative,
    sources,
)

# A file imports only lower ranks, or its own room; rooms of one rank never import each other.
RANKS = (
    ("errors",),
    ("environment", "notices", "_torch"),
    ("model", "graph"),
    ("plan", "ir"),
    ("estimator", "analysis", "watch"),
    ("rewrite", "lowering"),
    ("passes",),
    ("compiler",),
    ("runtime",),
    ("user",),
    ("cli",),
    ("sparselora_fx",),  # the public names
)
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}

EDITS = re.compile(
    r"\.(?:erase_node|call_function|call_method|call_module|node_copy|graph_copy|create_node"
    r"|inserting_before|inserting_after|replace_all_uses_with|replace_input_with|update_arg"
    r"|eliminate_dead_code|set_value|prepend|append_node)\("
    r"|\.(?:args|kwargs|target) = |\bset_value\(|\bcopied\(|\bwatch\("
)
PRIVATE = re.compile(
    r"\btorch\._(?:C|inductor|functorch|dynamo)\b|from torch import _"
    r"|\._erased\b|\.node\.expr\b|\._cdata\b"
)
MAY_USE_PRIVATE = {
    "sparselora_fx/_torch.py",
    "sparselora_fx/lowering/inductor.py",
    "sparselora_fx/lowering/inductor_backend.py",
}
_METADATA = ("example_value", "val", "tensor_meta")
ANY = re.compile(r"\bAny\b")
MOST_ANY = 141  # below a third of the 426 that there were before there were rooms
PLAIN = ("regions", "channel_values")  # what analyses found: they find nothing themselves
SAME_STYLE = ("sparselora_fx", "passes", "tests", "benchmarks")


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def code_of(path: Path) -> str:
    """A file without its comments and strings, so that a rule does not trip over prose."""
    tree = parsed(path)
    return ast.unparse(_Mute().visit(ast.parse(ast.unparse(tree))))


class _Mute(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
        return ast.Constant("")


def found_in(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    return [f"{relative(path)}: {m[0]}" for path in paths for m in pattern.finditer(code_of(path))]


def test_every_room_has_a_rank() -> None:
    rooms = {room_of(module_of(path)) for path in sources()}
    assert rooms == set(RANK_OF)


def test_imports_go_down() -> None:
    """Also those in functions and under TYPE_CHECKING."""
    bad = [
        f"{module} imports {other}"
        for module, others in import_graph().items()
        for other in sorted(others)
        if room_of(module) != room_of(other) and RANK_OF[room_of(other)] >= RANK_OF[room_of(module)]
    ]
    assert not bad, "\n".join(bad)


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A chain of imports that comes back to where it began, for each that a walk meets."""
    done: set[str] = set()

    def walk(module: str, chain: list[str]) -> Iterator[list[str]]:
        if module in chain:
            yield [*chain[chain.index(module) :], module]
            return
        if module in done:
            return
        for other in sorted(graph.get(module, set()) - {module}):
            yield from walk(other, [*chain, module])
        done.add(module)

    for module in sorted(graph):
        yield from walk(module, [])


def test_no_circle() -> None:
    bad = [" -> ".join(chain) for chain in circles(import_graph())]
    assert not bad, "\n".join(bad)


def test_circles_are_seen() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == [["a", "b", "c", "a"]]


def test_analyses_edit_nothing() -> None:
    files = [path for path in sources() if room_of(module_of(path)) == "analysis"]
    assert files
    assert not found_in(files, EDITS)


def test_metadata_is_written_in_one_place() -> None:
    """``node.meta["example_value"] = ...``, and in no other spelling."""

    def writes(tree: ast.AST) -> Iterator[int]:
        for node in ast.walk(tree):
            target = getattr(node, "targets", [getattr(node, "target", None)])
            for one in target if isinstance(target, list) else [target]:
                key = one.slice if isinstance(one, ast.Subscript) else None
                if isinstance(key, ast.Constant) and key.value in _METADATA:
                    yield one.lineno

    bad = [
        f"{relative(path)}:{line}"
        for path in sources()
        if relative(path) != "sparselora_fx/graph/emit.py"
        for line in writes(parsed(path))
    ]
    assert not bad, "\n".join(bad)


def test_private_torch_has_its_files() -> None:
    files = [path for path in sources() if relative(path) not in MAY_USE_PRIVATE]
    bad = found_in(files, PRIVATE)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "code", ["torch._C.x()", "import torch._dynamo", "node._erased", "size.node.expr", "t._cdata"]
)
def test_private_spellings_are_seen(code: str) -> None:
    assert PRIVATE.search(code)


def test_any_is_rare() -> None:
    """A type says what is there: ``object`` where nothing is assumed, a protocol of what is used of
    a library without types. ``Any`` is for what no type fits: example values, JSON."""
    found = {relative(path): len(ANY.findall(path.read_text("utf-8"))) for path in sources()}
    most = {name: count for name, count in found.items() if count > 5}
    assert sum(found.values()) <= MOST_ANY, f"{sum(found.values())}, most of them here: {most}"


def test_imports_have_one_style() -> None:
    """Absolute, by the folder that holds the file; tests take from each other through support."""
    bad = []
    for folder in SAME_STYLE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" in path.parts or "sparselora_fx/passes" in path.as_posix():
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            where = f"{path.relative_to(ROOT)}"
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level:
                    bad.append(f"{where}:{node.lineno}: a relative import")
            taken = [found for found in imports_in(tree, "") if folder == "tests"]
            bad += [
                f"{where}:{found.line}: imports {found.module}"
                for found in taken
                if re.match(r"tests\.(?!support\b|offgpu\b)", found.module)
            ]
    assert not bad, "\n".join(bad)


def missing(folder: str, mirror: str) -> list[str]:
    """The files of a folder without a test file of their own. Vocabulary has nothing to run."""
    names = {
        path.stem
        for path in (ROOT / folder).glob("*.py")
        if any(isinstance(node, ast.FunctionDef) for node in parsed(path).body)
    }
    tested = {path.stem.removeprefix("test_") for path in (ROOT / mirror).glob("test_*.py")}
    return sorted(names - tested)


def test_every_pass_has_a_test_file() -> None:
    assert not missing("passes", "tests/passes")


def test_every_analysis_has_a_test_file() -> None:
    assert not missing("sparselora_fx/analysis", "tests/analysis")


def test_every_analysis_says_why_it_is_sound() -> None:
    """A rule and what makes it sound; for facts about a whole graph also lattice and direction."""
    bad = []
    for path in (ROOT / "sparselora_fx/analysis").glob("*.py"):
        tree = parsed(path)
        holders = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        words = "\n".join(ast.get_docstring(node) or "" for node in holders)
        asked = {"Rule:", "Sound:"} | ({"Direction:"} if "Lattice:" in words else set())
        told = {word for word in asked if word in words}
        if any(isinstance(n, ast.FunctionDef) for n in tree.body) and path.stem not in PLAIN:
            bad += [f"{path.stem}: {word}" for word in sorted(asked - told)]
    assert not bad, "\n".join(bad)
