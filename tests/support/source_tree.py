"""The source tree as the tests of its rules read it: files, modules, imports."""

import ast
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = {"sparselora_fx": "sparselora_fx", "passes": "sparselora_fx.passes"}


def package_files(base: Path = ROOT) -> Iterator[Path]:
    """Every file of the package, once: the link sparselora_fx/passes is not followed."""
    for folder in PACKAGE_ROOTS:
        for where, subfolders, names in os.walk(base / folder):
            subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
            yield from (Path(where) / name for name in sorted(names))


def sources() -> list[Path]:
    return [path for path in package_files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(folder: Path, base: Path = ROOT) -> str:
    """passes/a -> sparselora_fx.passes.a"""
    top, *rest = folder.relative_to(base).parts
    return ".".join([PACKAGE_ROOTS[top], *rest])


def module_of(path: Path) -> str:
    package = package_of(path.parent)
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


class Import(NamedTuple):
    line: int
    module: str  # dotted and absolute; `from a import b` gives a.b, whether b is a module or a name


def imports_in(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import anywhere: in functions, under TYPE_CHECKING, through import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [".".join(parts)] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield Import(node.lineno, str(name.value))


def imports_of(path: Path) -> list[Import]:
    return list(imports_in(parsed(path), package_of(path.parent)))


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of this package that it imports, each resolved to a file on disk."""
    known = {module_of(path) for path in sources()}

    def resolve(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module_of(path): {found for item in imports_of(path) if (found := resolve(item.module))}
        for path in sources()
    }
