"""The rules of the tree: packaging, size budget, layers, imports, text."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import (
    PACKAGE_ROOTS,
    ROOT,
    Import,
    import_graph,
    imports_in,
    imports_of,
    module_of,
    package_files,
    package_of,
    parsed,
    relative,
    sources,
    within,
)

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

LOW_LAYER = ("errors", "model", "graph", "plan", "ir")
ABOVE_LOW_LAYER = ("sparselora_fx.passes", "sparselora_fx.compiler")
PRIVATE_TORCH = ("torch._inductor", "torch._functorch", "torch._dynamo")
MAY_USE_PRIVATE_TORCH = (
    "sparselora_fx/_torch.py",
    "sparselora_fx/lowering/inductor.py",
    "sparselora_fx/lowering/inductor_backend.py",
)
HEAVY = ("transformers", "peft", "triton", "torch._inductor", "typer")


# ---------------------------------------------------------------- reading the tree


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- reading imports


def private_uses_in(tree: ast.AST, package: str) -> Iterator[Import]:
    """Imports of torch's private compilers, and attribute access such as torch._dynamo.reset."""
    yield from (found for found in imports_in(tree, package) if within(found.module, PRIVATE_TORCH))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if dotted in PRIVATE_TORCH:
                yield Import(node.lineno, dotted)


def chain_to(start: str, forbidden: tuple[str, ...]) -> list[str] | None:
    """The shortest chain of imports from start to a forbidden module, or None."""
    chains, seen = [[start]], {start}
    while chains:
        chain = chains.pop(0)
        if within(chain[-1], forbidden):
            return chain
        for module in sorted(import_graph().get(chain[-1], set()) - seen):
            seen.add(module)
            chains.append([*chain, module])
    return None


# ---------------------------------------------------------------- packaging


def test_package_list_equals_folders() -> None:
    on_disk = {package_of(path.parent) for path in sources()}
    listed = read_project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)


def test_passes_is_mapped_and_linked() -> None:
    assert read_project()["tool"]["setuptools"]["package-dir"]["sparselora_fx.passes"] == "passes"
    link = ROOT / "sparselora_fx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in sources()}
    assert not [relative(folder) for folder in folders if not (folder / "__init__.py").exists()]


def build(kind: str, tree: Path, out: Path) -> Path:
    """What `python -m build` makes of a tree: "sdist" or "wheel"."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("with_link", [True, False], ids=["link", "no-link"])
def test_wheel_holds_every_file(tmp_path: Path, with_link: bool) -> None:
    """Built of an sdist of the tree. An archive without symbolic links (a .zip of the tree) must
    build the same wheel."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in PACKAGE_ROOTS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    if not with_link:
        (tree / "sparselora_fx" / "passes").unlink()
    expected = {
        f"{package_of(path.parent, tree).replace('.', '/')}/{path.name}"
        for path in package_files(tree)
        if path.suffix != ".md"
    }
    made = []
    if with_link:
        made.append(build("sdist", tree, tmp_path))
        with tarfile.open(made[0]) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        (tree,) = (tmp_path / "unpacked").iterdir()
    made.append(build("wheel", tree, tmp_path))
    with zipfile.ZipFile(made[-1]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_pin_every_direct_dependency() -> None:
    def name_of(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")

    project = read_project()["project"]
    wanted = {
        name_of(item)
        for item in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if re.match(r"[\w.-]+==\S+$", line)}
    assert wanted <= pinned, f"not pinned in constraints.txt: {sorted(wanted - pinned)}"
    assert "torch==2.13.0" in lines


# ---------------------------------------------------------------- size budget


def test_files_stay_within_the_line_budget() -> None:
    sizes = {relative(path): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert sizes, "no sources found"
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}


def test_functions_stay_within_the_line_budget() -> None:
    too_long = [
        f"{relative(path)}:{node.lineno} {node.name}: {size} lines"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


# ---------------------------------------------------------------- layers


def test_low_layer_does_not_reach_passes_or_backend() -> None:
    """Not even through a third module."""
    roots = tuple(f"sparselora_fx.{name}" for name in LOW_LAYER)
    modules = [module for module in import_graph() if within(module, roots)]
    assert "sparselora_fx.errors" in modules
    chains = [chain for module in modules if (chain := chain_to(module, ABOVE_LOW_LAYER))]
    assert not chains, "\n".join(" -> ".join(chain) for chain in chains)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("sparselora_fx.passes", "sparselora_fx.lowering"),
        ("sparselora_fx.lowering", "sparselora_fx.passes"),
    ],
)
def test_passes_and_lowering_meet_only_at_ops(importer: str, imported: str) -> None:
    bad = [
        f"{relative(path)}:{found.line} imports {found.module}"
        for path in sources()
        if within(module_of(path), (importer,))
        for found in imports_of(path)
        if within(found.module, (imported,))
    ]
    assert not bad, "\n".join(bad)


def test_private_torch_is_used_in_one_file_only() -> None:
    bad = [
        f"{relative(path)}:{found.line} uses {found.module}"
        for path in sources()
        if relative(path) not in MAY_USE_PRIVATE_TORCH
        for found in private_uses_in(parsed(path), package_of(path.parent))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch._inductor.config as c",
        "from torch import _dynamo",
        "from torch._functorch.partitioners import x",
        "def f():\n    import torch._inductor",
        "import torch\ntorch._dynamo.reset()",
        "import importlib\nimportlib.import_module('torch._inductor.ir')",
    ],
)
def test_private_uses_are_seen(code: str) -> None:
    assert list(private_uses_in(ast.parse(code), "sparselora_fx"))


@pytest.mark.parametrize(
    ("code", "package", "module"),
    [
        ("from . import backend", "sparselora_fx", "sparselora_fx.backend"),
        ("from .backend import a", "sparselora_fx", "sparselora_fx.backend.a"),
        ("from .. import lowering", "sparselora_fx.passes", "sparselora_fx.lowering"),
        ("from ..lowering.x import y", "sparselora_fx.passes", "sparselora_fx.lowering.x.y"),
        ("import sparselora_fx.backend", "sparselora_fx", "sparselora_fx.backend"),
    ],
)
def test_imports_are_resolved(code: str, package: str, module: str) -> None:
    assert [found.module for found in imports_in(ast.parse(code), package)] == [module]


# ---------------------------------------------------------------- importing, in a fresh process


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_import_passes_by_its_folder_name_is_refused() -> None:
    done = run_python("import passes")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:")
    assert "sparselora_fx.passes" in last


def test_import_is_lean() -> None:
    code = f"import sys, sparselora_fx\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- text


def text_files() -> Iterator[Path]:
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".ini", ".sh", ".jinja"}
    for path in ROOT.iterdir():
        if path.is_file() and (path.suffix in suffixes or path.name == "Makefile"):
            yield path
    yield from (path for path in (ROOT / ".ci").rglob("*") if path.is_file())
    for folder in ("sparselora_fx", "passes", "tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in suffixes:
                yield path


def test_no_absolute_machine_paths() -> None:
    pattern = re.compile(r"(?:(?<![\w.<~/-])|file://)/(?:root|work|home)\b")
    assert pattern.search("see /" + "home/someone") and not pattern.search("https://x.org/home")
    bad = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not bad, "\n".join(bad)
