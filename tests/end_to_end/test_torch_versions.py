"""What the package uses of torch's private interface exists and does what it is used for, in the
torch that runs, and the metadata names just the versions that are tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from sparselora_fx import _torch
from sparselora_fx.lowering import inductor, inductor_backend

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.private_torch


def test_metadata_names_the_known_versions() -> None:
    """`pip install` must not bring a torch on which the lowerings switch themselves off."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch_range,) = [d for d in project["dependencies"] if re.match(r"torch\b", d)]
    first, last = inductor_backend.KNOWN_VERSIONS[0], inductor_backend.KNOWN_VERSIONS[-1]
    major, minor = map(int, last.split("."))
    assert torch_range == f"torch>={first},<{major}.{minor + 1}"
    script = (ROOT / ".ci" / "torch-version").read_text(encoding="utf-8")
    (others,) = re.findall(r"for each in ([\d. ]+);", script)
    pinned = re.search(
        r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
    )
    assert pinned is not None
    assert sorted([*others.split(), pinned[1]]) == sorted(inductor_backend.KNOWN_VERSIONS)


def test_the_running_torch_is_known() -> None:
    assert ".".join(torch.__version__.split(".")[:2]) in inductor_backend.KNOWN_VERSIONS
    assert inductor_backend.install_lowerings()
    assert all(value is not None for value in vars(inductor.inductor()).values())


def test_in_backward_is_true_in_a_backward_only() -> None:
    seen: list[bool] = []
    x = torch.randn(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(_torch.in_backward()))
    assert not _torch.in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not _torch.in_backward()


def test_the_recompile_limit_reaches_torch_compile() -> None:
    """More graphs than torch's default limit of 8 are compiled, not run eagerly."""
    graphs = 0

    def backend(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward

    def scaled(x: torch.Tensor, by: int) -> torch.Tensor:
        return x * by

    torch._dynamo.reset()
    run = _torch.compile_callable(scaled, backend, False)
    for by in range(12):
        run(torch.ones(2), by)
    assert graphs == 12


def test_a_marked_dimension_needs_no_second_graph() -> None:
    graphs = 0

    def backend(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: x * 2, backend=backend)
    for length in (16, 24, 40):
        x = torch.ones(length)
        _torch.mark_dynamic(x)
        run(x)
    assert graphs == 1


def test_settings_exist() -> None:
    """A setting that a newer torch does not know would be a typo without this."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    for name in {**inductor_backend._ON_CPU, **inductor.only_choices("x")}:
        assert name in inductor_config._config
    with inductor_backend.saving_less():
        assert functorch_config.ban_recompute_materialized_backward is False


def test_storage_is_shared_by_views_only() -> None:
    x = torch.randn(4, 4)
    assert _torch.storage_key(x) == _torch.storage_key(x[1:])
    assert _torch.storage_key(x) != _torch.storage_key(x.clone())
