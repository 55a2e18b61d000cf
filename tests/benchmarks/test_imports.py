"""Every benchmark can be imported: what moves in one must not be missed by another."""

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_imported(name: str) -> None:
    importlib.import_module(name)
